"""Free generation in batches: greedy or sampled, each row up to its own natural end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from prune_lightning.errors import UserError
from prune_lightning.models.batching import TOKEN_BUDGET, by_length
from prune_lightning.models.language_model import LanguageModel


@dataclass(frozen=True)
class Continuation:
    """What a model said after a prompt.

    Args:
        ids: The new tokens up to the natural end: the one that completed a stop text, or the last before an end token.
        text: The new text; cut behind the first stop text, which is still there.
        finite: Whether all logits behind it were numbers; if not, nothing after them is kept.
    """

    ids: tuple[int, ...]
    text: str
    finite: bool = True


@dataclass(frozen=True)
class TopK:
    """Sampling from the ``k`` likeliest tokens.

    The noise of a row comes from a generator of its own, so that what is drawn depends on the row's seed and not on
    the batch it is in.

    Args:
        k: How many tokens to choose from.
        seeds: One per prompt.
    """

    k: int
    seeds: Sequence[int]


class _Rows:
    """The rows of one batch while they grow: which are done, and which logits were no numbers."""

    def __init__(
        self, model: LanguageModel, start: int, limits: list[int], stops: Sequence[str], sampling: TopK | None
    ) -> None:
        self.tokens, self.start, self.limits, self.stops, self.sampling = model.tokens, start, limits, stops, sampling
        self.finite_until = list(limits)
        self.noise = [torch.Generator().manual_seed(seed) for seed in sampling.seeds] if sampling else []

    def scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note rows that are not finite; under sampling add Gumbel noise, whose argmax is a draw from the softmax."""
        step = input_ids.shape[1] - self.start
        for row in (~torch.isfinite(scores.logsumexp(-1))).nonzero().flatten().tolist():
            self.finite_until[row] = min(self.finite_until[row], step)
        if self.sampling is None:
            return scores
        top, index = scores.topk(min(self.sampling.k, scores.shape[1]))
        uniform = torch.stack([torch.rand(top.shape[1], generator=generator) for generator in self.noise])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        return torch.full_like(scores, -torch.inf).scatter(1, index, top + noise.to(top))

    def done(self, input_ids: Tensor) -> Tensor:
        """Return which rows have reached a stop text, their limit, or logits that are no numbers."""
        new = input_ids.shape[1] - self.start
        done = [new >= min(ends) for ends in zip(self.limits, self.finite_until, strict=True)]
        if self.stops:
            texts = self.tokens.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
            done = [over or self._stopped(text) for over, text in zip(done, texts, strict=True)]
        return torch.tensor(done, device=input_ids.device)

    def _stopped(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)

    def continuation(self, row: int, new: list[int], ends: set[int]) -> Continuation:
        """Return what a row says up to its natural end; what follows is padding."""
        said = new[: min(self.limits[row], self.finite_until[row])]
        ids = said[: next((i for i, token in enumerate(said) if token in ends), len(said))]
        finite = len(ids) < len(said) or self.finite_until[row] >= self.limits[row]
        text = self.tokens.decode(ids)
        if self._stopped(text):
            ids = ids[: next(i for i in range(1, len(ids) + 1) if self._stopped(self.tokens.decode(ids[:i])))]
            text = self.tokens.decode(ids)
            return Continuation(tuple(ids), text[: min(text.index(s) + len(s) for s in self.stops if s in text)])
        return Continuation(tuple(ids), text, finite)


class _Choose(LogitsProcessor):
    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self.rows.scores(input_ids, scores)


class _Done(StoppingCriteria):
    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self.rows.done(input_ids)


@contextmanager
def _nothing_but_the_model(model: LanguageModel) -> Iterator[set[int]]:
    """Set aside what a checkpoint wishes for its chats (sampling, penalties); yield its end tokens."""
    own = model.model.generation_config
    wished = own.eos_token_id
    ends = wished if isinstance(wished, list) else [wished]
    ends = sorted({*ends, model.tokens.tokenizer.eos_token_id} - {None})
    model.model.generation_config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=model.tokens.pad_id, do_sample=False, num_beams=1
    )
    try:
        with model.frozen_mode():
            yield set(ends)
    finally:
        model.model.generation_config = own


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stops: Sequence[str] = (),
    sampling: TopK | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Continuation]:
    """Continue prompts, padded on the left, each until its natural end.

    A row ends with an end token, with a stop text, or at its limit, and leaves nothing behind that. Greedy decoding
    takes the model's first choice, whatever the checkpoint's own generation settings are.

    Args:
        model: The language model.
        prompts: Token ids; one that leaves too little of the context loses its first tokens.
        limits: Most new tokens of each prompt; one that asks for none gets none.
        stops: Texts behind which a continuation is cut.
        sampling: Draw tokens instead of taking the first choice.
        token_budget: Padded tokens per forward pass.

    Raises:
        UserError: A limit that fills the model's context.
    """
    if limits and max(limits) >= model.tokens.max_length:
        raise UserError(f"{max(limits)} new tokens do not fit the model's context of {model.tokens.max_length}")
    room = model.tokens.max_length - max(limits, default=0)
    results = [Continuation((), "")] * len(prompts)
    wanted = [i for i, limit in enumerate(limits) if limit > 0]
    with _nothing_but_the_model(model) as ends:
        for places in by_length([len(prompts[i]) + limits[i] for i in wanted], token_budget):
            group = [wanted[place] for place in places]
            cut = [list(prompts[i])[-room:] for i in group]
            ids, mask = model.tokens.pad([row[::-1] for row in cut], model.device)
            drawn = TopK(sampling.k, [sampling.seeds[i] for i in group]) if sampling else None
            rows = _Rows(model, ids.shape[1], [limits[i] for i in group], stops, drawn)
            generated = model.model.generate(
                input_ids=ids.flip(1),
                attention_mask=mask.flip(1),
                max_new_tokens=max(rows.limits),
                logits_processor=[_Choose(rows)],
                stopping_criteria=[_Done(rows)],
            )
            for row, i in enumerate(group):
                results[i] = rows.continuation(row, generated[row, ids.shape[1] :].tolist(), ends)
    return results
