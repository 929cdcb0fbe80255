"""Teacher-forced scores of continuations and greedy continuations, batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel

TOKEN_BUDGET = 8192


@dataclass(frozen=True)
class PairScores:
    r"""Scores of ``n`` (prompt, target) pairs, on the model's device.

    Args:
        nll: Mean negative log-likelihood per target token,
            :math:`\ell(y|x) = -\frac1{|y|}\sum_j \log p(y_j \mid x, y_{<j})`, shape ``(n,)``.
        hit: Whether every target token is the model's first choice, shape ``(n,)``. This equals greedy decoding of
            the target's length being exactly the target.
        num_tokens: Length of the target, shape ``(n,)``.
    """

    nll: Tensor
    hit: Tensor
    num_tokens: Tensor

    def __getitem__(self, index: Tensor) -> PairScores:
        return PairScores(self.nll[index], self.hit[index], self.num_tokens[index])


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield indices grouped by similar length such that padded rows stay within ``budget`` tokens."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[index] > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@torch.no_grad()
def score_pairs(model: LanguageModel, pairs: Sequence[tuple[str, str]], token_budget: int = TOKEN_BUDGET) -> PairScores:
    """Score targets after their prompts under teacher forcing.

    Equal pairs are computed once, rows are grouped by length, and the LM head runs on target positions only.

    Args:
        model: The language model.
        pairs: ``(prompt, target)`` texts.
        token_budget: Padded tokens per forward pass.
    """
    unique = list(dict.fromkeys(pairs))
    encoded = [model.tokens.encode_pair(*pair) for pair in unique]
    nll = torch.zeros(len(unique), device=model.device)
    hit = torch.zeros(len(unique), dtype=torch.bool, device=model.device)
    with model.frozen_mode():
        for group in _batches([len(pair.ids) for pair in encoded], token_budget):
            chosen = [encoded[i] for i in group]
            ids, mask = model.tokens.pad([pair.ids for pair in chosen], model.device)
            rows: list[int] = []
            positions: list[int] = []
            labels: list[int] = []
            for row, pair in enumerate(chosen):
                rows += [row] * len(pair.target)
                positions += range(pair.target_start - 1, len(pair.ids) - 1)
                labels += pair.target
            owner = torch.tensor(rows, device=model.device)
            label = torch.tensor(labels, device=model.device)
            logits = model.logits_at(ids, mask, owner, torch.tensor(positions, device=model.device)).float()
            losses = torch.nn.functional.cross_entropy(logits, label, reduction="none")
            missed = (logits.argmax(-1) != label) | ~torch.isfinite(losses)
            zeros = torch.zeros(len(group), device=model.device)
            counts = zeros.index_add(0, owner, torch.ones_like(losses))
            where = torch.tensor(group, device=model.device)
            nll[where] = zeros.index_add(0, owner, losses) / counts
            hit[where] = zeros.index_add(0, owner, missed.float()) == 0
    place = {pair: i for i, pair in enumerate(unique)}
    index = torch.tensor([place[pair] for pair in pairs], dtype=torch.long, device=model.device)
    lengths = torch.tensor([len(pair.target) for pair in encoded], device=model.device)
    return PairScores(nll, hit, lengths)[index]


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of ``n`` prompts.

    Args:
        texts: Without the prompt, stripped of surrounding blanks; empty where the logits were not finite.
        finite: Whether all logits of a row were finite; the first choice among NaN means nothing.
        truncated: Whether a prompt was too long for the model's context and lost its beginning.
    """

    texts: list[str]
    finite: list[bool]
    truncated: list[bool]


class _FiniteRows(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing, but remembers the rows whose logits held NaN or positive infinity."""

    def __init__(self) -> None:
        self.finite = torch.tensor(True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite = self.finite.to(scores.device) & torch.isfinite(scores.float().logsumexp(-1))
        return scores


@torch.no_grad()
def greedy_continuations(
    model: LanguageModel, prompts: Sequence[str], max_new_tokens: int, stop: str, token_budget: int = TOKEN_BUDGET
) -> list[str]:
    """Return the texts of :func:`continue_greedily`."""
    return continue_greedily(model, prompts, max_new_tokens, stop, token_budget).texts


@torch.no_grad()
def continue_greedily(
    model: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: str | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Continuations:
    """Continue each prompt greedily until ``stop``, the end token, or ``max_new_tokens``.

    Rows are padded on the left and grouped by length. A prompt that leaves no room for the new tokens loses its
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
    whole = [model.tokens.encode(prompt) for prompt in prompts]
    encoded = [ids[-room:] for ids in whole]
    texts, finite = [""] * len(prompts), [True] * len(prompts)
    stopping = {"tokenizer": model.tokens.tokenizer, "stop_strings": [stop]} if stop else {}
    with model.frozen_mode():
        for group in _batches([len(ids) + max_new_tokens for ids in encoded], token_budget):
            rows = [encoded[i] for i in group]
            longest = max(map(len, rows))
            ids, mask = model.tokens.pad([row[::-1] for row in rows], model.device)
            watch = _FiniteRows()
            generated = model.model.generate(
                input_ids=ids.flip(1),
                attention_mask=mask.flip(1),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=model.tokens.pad_id,
                logits_processor=LogitsProcessorList([watch]),
                **stopping,
            )
            for i, row, sound in zip(group, generated, watch.finite.tolist(), strict=True):
                text = model.tokens.decode(row[longest:]) if sound else ""
                texts[i] = (text.split(stop)[0] + stop if stop and stop in text else text).strip()
                finite[i] = sound
    return Continuations(texts, finite, [len(a) > len(b) for a, b in zip(whole, encoded, strict=True)])


@torch.no_grad()
def token_nll(
    model: LanguageModel, texts: Sequence[str], token_budget: int = TOKEN_BUDGET, special_tokens: bool = True
) -> tuple[Tensor, Tensor]:
    """Return each text's summed negative log-likelihood (its first token is given) and its number of scored tokens.

    Args:
        model: The language model.
        texts: Texts; one of a single token has none to score.
        token_budget: Padded tokens per forward pass.
        special_tokens: Whether the special tokens that the model expects stand in front.

    Returns:
        Two tensors of shape ``(len(texts),)``.
    """
    encoded = [model.tokens.encode(text, special_tokens)[: model.tokens.max_length] for text in texts]
    nll = torch.zeros(len(texts), device=model.device)
    count = torch.tensor([len(ids) - 1 for ids in encoded], device=model.device)
    with model.frozen_mode():
        for group in _batches([len(ids) for ids in encoded], token_budget):
            ids, mask = model.tokens.pad([encoded[i] for i in group], model.device)
            labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            logits = model(ids, mask)[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
            )
            nll[torch.tensor(group, device=model.device)] = losses.view_as(labels).sum(1)
    return nll, count
