"""Teacher-forced scores of continuations and greedy continuations, batched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.likelihoods import likelihoods
from prune_lightning.evaluation.pair_scores import NOTHING, PairScores
from prune_lightning.models.batching import TOKEN_BUDGET, by_length, within_logits
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.packing import PAYS, WORTH, shares_beginnings, trees
from prune_lightning.models.prompt_memory import PromptMemory
from prune_lightning.models.token_tree import ROW_LENGTH, TreeRow, tree_inputs
from prune_lightning.models.tokenization import EncodedPair
from prune_lightning.text.separators import Pair, as_pair


@dataclass(frozen=True)
class _Batch:
    """Inputs of a forward pass, with the row of each pair and where its tokens are in it.

    ``prompts`` is the number of tokens of each row's prompt; empty for rows that hold several pairs.
    """

    inputs: dict[str, Tensor]
    paths: Mapping[int, tuple[int, Sequence[int]]]
    prompts: Sequence[int] = ()


def _plain(model: LanguageModel, pairs: Sequence[EncodedPair], budget: int) -> Iterator[_Batch]:
    """Yield batches with one row per pair, grouped by length."""
    vocabulary = int(model.config.vocab_size)
    logits = [vocabulary * len(pair.target) for pair in pairs]
    for group in by_length([len(pair.ids) for pair in pairs], budget, logits):
        ids, mask = model.tokens.pad([pairs[i].ids for i in group], model.device)
        paths = {i: (row, range(len(pairs[i].ids) - 1)) for row, i in enumerate(group)}
        yield _Batch({"input_ids": ids, "attention_mask": mask}, paths, [pairs[i].target_start for i in group])


def _trees(model: LanguageModel, pairs: Sequence[EncodedPair], budget: int, most: float) -> list[TreeRow] | None:
    """Return rows in which pairs share tokens; ``None`` if more than this share of the tokens would remain."""
    sequences = [pair.ids[:-1] for pair in pairs]  # the logits at the last token are not read
    lengths = [len(sequence) for sequence in sequences]
    return trees(model, sequences, max(*lengths, min(ROW_LENGTH, budget)), sum(lengths), most) if pairs else None


def _shared(
    model: LanguageModel, pairs: Sequence[EncodedPair], rows: Sequence[TreeRow], budget: int
) -> Iterator[_Batch]:
    """Yield batches of trees."""
    read = [{i: path[pairs[i].target_start - 1 :] for i, path in row.paths.items()} for row in rows]
    vocabulary = int(model.config.vocab_size)
    logits = [vocabulary * len({place for path in paths.values() for place in path}) for paths in read]
    for group in by_length([len(row.ids) for row in rows], budget, logits):
        inputs = tree_inputs([rows[i] for i in group], model.tokens.pad_id, model.model.dtype, model.device)
        yield _Batch(
            inputs, {i: (row, path) for row, place in enumerate(group) for i, path in rows[place].paths.items()}
        )


def score_pairs(model: LanguageModel, pairs: Sequence[Pair], token_budget: int = TOKEN_BUDGET) -> PairScores:
    """Score targets after their prompts under teacher forcing.

    Equal pairs are computed once, and so are shared prefixes (targets of one prompt, prompts with the same beginning).
    The LM head runs only where a target token is predicted. While the model is known to stay as it is
    (:meth:`.KeptResults.while_unchanged`), pairs that were scored before are not run again.

    Args:
        model: The language model.
        pairs: Literal texts, or ``(prompt, target)`` with an inferred separator.
        token_budget: Padded tokens per forward pass.
    """
    literal = [as_pair(pair) for pair in pairs]
    places, known = model.kept.get(PairScores, ({}, None))
    new = [pair for pair in dict.fromkeys(literal) if pair not in places]
    scores = score_encoded(model, model.tokens.encode_pairs(new), token_budget)
    scores = scores if known is None else known.followed_by(scores)
    places = places | {pair: len(places) + i for i, pair in enumerate(new)}
    model.kept.put(PairScores, (places, scores))
    return scores[torch.tensor([places[pair] for pair in literal], dtype=torch.long, device=model.device)]


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of ``n`` prompts.

    Args:
        texts: Without the prompt, stripped of surrounding blanks; empty where the logits were not finite.
        finite: Whether all logits of a row were finite; an argmax over NaN is meaningless.
        truncated: Whether a prompt was too long for the model's context and was cut at its beginning.
    """

    texts: list[str]
    finite: list[bool]
    truncated: list[bool]


@torch.no_grad()
def score_encoded(
    model: LanguageModel, pairs: Sequence[EncodedPair], token_budget: int = TOKEN_BUDGET, trees: bool = True
) -> PairScores:
    """Score pairs that are encoded already; see :func:`score_pairs`.

    Args:
        model: The language model.
        pairs: Encoded prompts with targets.
        token_budget: Padded tokens per forward pass.
        trees: Share prefixes where that is faster; otherwise each pair is a separate row.
    """
    asked = model.asked([(pair.ids, pair.target_start) for pair in pairs])
    run = [replace(pair, ids=list(ids), target_start=start) for pair, (ids, start) in zip(pairs, asked, strict=True)]
    memory = None if not trees or shares_beginnings(model) else model.memory
    with nullcontext() if memory is None else memory.unedited():
        rows = _trees(model, run, token_budget, PAYS if memory is None else WORTH) if trees else None
        if rows is not None:
            scores, answered = _scored(model, run, _shared(model, run, rows, token_budget), memory)
    if rows is None:
        return _scored(model, run, _plain(model, run, token_budget))[0]
    # Zero times NaN is NaN: through the attention, a NaN at one token reaches all tokens of its row. Such pairs, and
    # those that the memory answers, are scored again in rows of their own.
    alone = torch.nonzero(scores.nonfinite | answered)[:, 0]
    if len(alone):
        index = torch.arange(len(run), device=model.device)
        index[alone] = len(run) + torch.arange(len(alone), device=model.device)
        some = [run[i] for i in alone.tolist()]
        scores = scores.followed_by(_scored(model, some, _plain(model, some, token_budget))[0])[index]
    return scores


def _scored(
    model: LanguageModel, pairs: Sequence[EncodedPair], batches: Iterator[_Batch], memory: PromptMemory | None = None
) -> tuple[PairScores, Tensor]:
    """Score pairs in batches. With ``memory``, the model runs without it; also return which pairs it would answer."""
    exact = torch.promote_types(model.model.dtype, torch.float32)
    lengths = torch.tensor([len(pair.target) for pair in pairs], dtype=torch.long, device=model.device)
    total = torch.zeros(len(pairs), dtype=exact, device=model.device)
    hits, answered = torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.bool)
    predicted = torch.full((len(pairs), int(lengths.max()) if pairs else 0), NOTHING, device=model.device)
    with model.frozen_mode():
        for batch in batches:
            read = {i: (row, path[pairs[i].target_start - 1 :]) for i, (row, path) in batch.paths.items()}
            owner = [i for i, (_, places) in read.items() for _ in places]
            step = [j for _, places in read.values() for j in range(len(places))]
            label = [token for i in read for token in pairs[i].target]
            where = [(row, place) for row, places in read.values() for place in places]
            number = {place: i for i, place in enumerate(dict.fromkeys(where))}  # targets of one prompt share positions
            rows, places = torch.tensor(list(number), device=model.device).unbind(1)
            index, owners, steps, labels = torch.tensor(
                [[number[place] for place in where], owner, step, label], device=model.device
            )
            watched = nullcontext() if memory is None else memory.watch(len(batch.inputs["input_ids"]))
            with model.prompts(batch.prompts), watched as which_answered:
                losses, choice = likelihoods(
                    model.logits_at(**batch.inputs, rows=rows, positions=places), index, labels
                )
            total.index_add_(0, owners, losses)
            hits.index_add_(0, owners, (choice == labels).long())
            predicted[owners, steps] = choice
            if which_answered is not None:
                prompts = [path[: pairs[i].target_start] for i, (_, path) in batch.paths.items()]
                found = which_answered([row for row, _ in batch.paths.values()], prompts)
                answered[list(batch.paths)] = torch.tensor(found, device=model.device)
    broken = ~torch.isfinite(total)  # also where only the last tokens are
    hits, predicted = hits.masked_fill(broken, 0), predicted.masked_fill(broken[:, None], NOTHING)
    retokenised = torch.tensor([pair.retokenised for pair in pairs], dtype=torch.bool, device=model.device)
    return PairScores(total / lengths, hits, lengths, predicted, retokenised), answered


def greedy_continuations(
    model: LanguageModel, prompts: Sequence[str], max_new_tokens: int, stop: str, token_budget: int = TOKEN_BUDGET
) -> list[str]:
    """Return the texts of :func:`continue_greedily`."""
    return continue_greedily(model, prompts, max_new_tokens, stop, token_budget).texts


def continue_greedily(
    model: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: str | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Continuations:
    """Continue each prompt greedily until ``stop``, the end token, or ``max_new_tokens``.

    Rows are padded on the left and grouped by length. A prompt that leaves no room for the new tokens is cut at its
    beginning.

    Args:
        model: The language model.
        prompts: Texts to continue.
        max_new_tokens: Longest continuation, in tokens.
        stop: The continuation is cut after the first occurrence of this text, if one is given.
        token_budget: Padded tokens per forward pass.
    """
    room = model.tokens.max_length - max_new_tokens
    if room < 1:
        raise UserError(f"{max_new_tokens} new tokens leave no room in a context of {model.tokens.max_length}")
    whole = model.tokens.encode_all(prompts)
    encoded = [ids[-room:] for ids in whole]
    stops = [stop] if stop else []
    done = decode(model, encoded, [max_new_tokens] * len(encoded), stops=stops, token_budget=token_budget)
    return Continuations(
        [one.text.strip() if one.finite else "" for one in done],
        [one.finite for one in done],
        [len(a) > len(b) for a, b in zip(whole, encoded, strict=True)],
    )


@torch.no_grad()
def token_nll(
    model: LanguageModel, texts: Sequence[str], token_budget: int = TOKEN_BUDGET, special_tokens: bool = True
) -> tuple[Tensor, Tensor]:
    """Return each text's summed negative log-likelihood (without its first token) and its number of scored tokens.

    Args:
        model: The language model.
        texts: Texts; a single token has nothing to score.
        token_budget: Padded tokens per forward pass; less for a large vocabulary, since logits are computed at all.
        special_tokens: Whether to add the special tokens that the model expects at the beginning.

    Returns:
        Two tensors of shape ``(len(texts),)``.
    """
    encoded = [model.tokens.encode(text, special_tokens)[: model.tokens.max_length] for text in texts]
    nll = torch.zeros(len(texts), device=model.device)
    count = torch.tensor([len(ids) - 1 for ids in encoded], device=model.device)
    budget = within_logits(token_budget, int(model.config.vocab_size))
    with model.frozen_mode():
        for group in by_length([len(ids) for ids in encoded], budget):
            ids, mask = model.tokens.pad([encoded[i] for i in group], model.device)
            where, following = torch.arange(ids.numel(), device=model.device), ids.roll(-1, 1).flatten()
            losses = likelihoods(model(ids, mask).flatten(0, 1), where, following)[0].view_as(ids)[:, :-1]
            nll[torch.tensor(group, device=model.device)] = losses.masked_fill(mask[:, 1:] == 0, 0.0).sum(1).to(nll)
    return nll, count
