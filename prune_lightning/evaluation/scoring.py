"""Teacher-forced scores of continuations and greedy continuations, batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.likelihoods import likelihoods
from prune_lightning.models.batching import TOKEN_BUDGET, by_length, within_logits
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.packing import trees
from prune_lightning.models.token_tree import ROW_LENGTH, tree_inputs
from prune_lightning.models.tokenization import EncodedPair
from prune_lightning.text.separators import Pair, as_pair

NOTHING = -1
"""Fills :attr:`PairScores.predicted` after the target's end, and where the likelihood is not finite."""


@dataclass(frozen=True)
class PairScores:
    r"""Scores of ``n`` (prompt, target) pairs, on the model's device.

    Args:
        nll: Mean negative log-likelihood per target token,
            :math:`\ell(y|x) = -\frac1{|y|}\sum_j \log p(y_j \mid x, y_{<j})`, shape ``(n,)``.
        num_hits: Number of target tokens that are the model's first choice given the preceding ones, shape ``(n,)``.
        num_tokens: Length of the target, shape ``(n,)``.
        predicted: The model's first choices at the target's tokens, shape ``(n, longest target)``; ``NOTHING`` fills
            the rest.
        retokenised: Whether the prompt's last tokens change when the target follows, shape ``(n,)``.
    """

    nll: Tensor
    num_hits: Tensor
    num_tokens: Tensor
    predicted: Tensor
    retokenised: Tensor

    def __getitem__(self, index: Any) -> PairScores:
        return PairScores(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def followed_by(self, other: PairScores) -> PairScores:
        """Return these scores and then the other ones."""
        longest = max(self.predicted.shape[1], other.predicted.shape[1])
        level = [
            replace(s, predicted=pad(s.predicted, (0, longest - s.predicted.shape[1]), value=NOTHING))
            for s in (self, other)
        ]
        return PairScores(*(torch.cat([getattr(s, name) for s in level]) for name in self.__dataclass_fields__))

    @property
    def hit(self) -> Tensor:
        """Whether every target token is the model's first choice, as in greedy decoding of its length."""
        return self.num_hits == self.num_tokens

    @property
    def match(self) -> Tensor:
        """The share of the target's tokens that are the model's first choice (token match ratio)."""
        return self.num_hits / self.num_tokens

    @property
    def nonfinite(self) -> Tensor:
        """Whether the likelihood is not finite, which every score counts as a failure."""
        return ~torch.isfinite(self.nll)

    @property
    def num_nonfinite(self) -> int:
        """Number of pairs whose likelihood is not finite."""
        return int(self.nonfinite.sum())

    @property
    def num_retokenised(self) -> int:
        """Number of pairs whose prompt is tokenised differently when the target follows."""
        return int(self.retokenised.sum())

    def num_agreeing(self, other: PairScores) -> Tensor:
        """Return the number of tokens of each target with the same first choice in both models, shape ``(n,)``."""
        width = min(self.predicted.shape[1], other.predicted.shape[1])
        ours, theirs = self.predicted[:, :width], other.predicted[:, :width].to(self.predicted)
        return ((ours == theirs) & (ours != NOTHING)).sum(1)


@dataclass(frozen=True)
class _Batch:
    """Inputs of a forward pass, with the row and the target positions of each pair in it.

    ``prompts`` is the number of tokens of each row's prompt; empty for rows that hold several pairs.
    """

    inputs: dict[str, Tensor]
    places: dict[int, tuple[int, list[int]]]
    prompts: Sequence[int] = ()


def _plain(model: LanguageModel, pairs: Sequence[EncodedPair], budget: int) -> Iterator[_Batch]:
    """Yield batches with one row per pair, grouped by length."""
    vocabulary = int(model.config.vocab_size)
    logits = [vocabulary * len(pair.target) for pair in pairs]
    for group in by_length([len(pair.ids) for pair in pairs], budget, logits):
        ids, mask = model.tokens.pad([pairs[i].ids for i in group], model.device)
        places = {
            i: (row, list(range(pairs[i].target_start - 1, len(pairs[i].ids) - 1))) for row, i in enumerate(group)
        }
        yield _Batch({"input_ids": ids, "attention_mask": mask}, places, [pairs[i].target_start for i in group])


def _batches(model: LanguageModel, pairs: Sequence[EncodedPair], budget: int) -> Iterator[_Batch]:
    """Yield batches of trees if the pairs share enough tokens, else of plain rows."""
    sequences = [pair.ids[:-1] for pair in pairs]  # the logits at the last token are not read
    lengths = [len(sequence) for sequence in sequences]
    rows = trees(model, sequences, max(*lengths, min(ROW_LENGTH, budget)), sum(lengths))
    if rows is None:
        yield from _plain(model, pairs, budget)
        return
    read = [{i: path[pairs[i].target_start - 1 :] for i, path in row.paths.items()} for row in rows]
    vocabulary = int(model.config.vocab_size)
    logits = [vocabulary * len({place for path in paths.values() for place in path}) for paths in read]
    for group in by_length([len(row.ids) for row in rows], budget, logits):
        inputs = tree_inputs([rows[i] for i in group], model.tokens.pad_id, model.model.dtype, model.device)
        yield _Batch(inputs, {i: (row, path) for row, place in enumerate(group) for i, path in read[place].items()})


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
    scores = _scored(model, pairs, _batches if trees else _plain, token_budget)
    if trees and bool(scores.nonfinite.any()):
        # Zero times NaN is NaN: through the attention, a NaN at one token reaches all tokens of its row. Where pairs
        # share a row, they are scored again in rows of their own.
        alone = torch.nonzero(scores.nonfinite)[:, 0]
        index = torch.arange(len(pairs), device=model.device)
        index[alone] = len(pairs) + torch.arange(len(alone), device=model.device)
        again = _scored(model, [pairs[i] for i in alone.tolist()], _plain, token_budget)
        scores = scores.followed_by(again)[index]
    return scores


def _scored(
    model: LanguageModel,
    pairs: Sequence[EncodedPair],
    arrange: Callable[[LanguageModel, Sequence[EncodedPair], int], Iterator[_Batch]],
    token_budget: int,
) -> PairScores:
    """Score pairs in batches that ``arrange`` makes."""
    exact = torch.promote_types(model.model.dtype, torch.float32)
    lengths = torch.tensor([len(pair.target) for pair in pairs], dtype=torch.long, device=model.device)
    total = torch.zeros(len(pairs), dtype=exact, device=model.device)
    hits = torch.zeros_like(lengths)
    predicted = torch.full((len(pairs), int(lengths.max()) if pairs else 0), NOTHING, device=model.device)
    asked = model.asked([(pair.ids, pair.target_start) for pair in pairs])
    run = [replace(pair, ids=list(ids), target_start=start) for pair, (ids, start) in zip(pairs, asked, strict=True)]
    batches = arrange(model, run, token_budget) if pairs else ()
    with model.frozen_mode():
        for batch in batches:
            owner = [i for i, (_, places) in batch.places.items() for _ in places]
            step = [j for _, places in batch.places.values() for j in range(len(places))]
            label = [token for i in batch.places for token in pairs[i].target]
            where = [(row, place) for row, places in batch.places.values() for place in places]
            number = {place: i for i, place in enumerate(dict.fromkeys(where))}  # targets of one prompt share positions
            rows, places = torch.tensor(list(number), device=model.device).unbind(1)
            index, owners, steps, labels = torch.tensor(
                [[number[place] for place in where], owner, step, label], device=model.device
            )
            with model.prompts(batch.prompts):
                losses, choice = likelihoods(
                    model.logits_at(**batch.inputs, rows=rows, positions=places), index, labels
                )
            total.index_add_(0, owners, losses)
            hits.index_add_(0, owners, (choice == labels).long())
            predicted[owners, steps] = choice
    broken = ~torch.isfinite(total)  # also where only the last tokens are
    hits, predicted = hits.masked_fill(broken, 0), predicted.masked_fill(broken[:, None], NOTHING)
    retokenised = torch.tensor([pair.retokenised for pair in pairs], dtype=torch.bool, device=model.device)
    return PairScores(total / lengths, hits, lengths, predicted, retokenised)


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
