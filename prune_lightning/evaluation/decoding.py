"""Free generation in batches, greedy or sampled, each row up to its natural end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from prune_lightning.errors import UserError
from prune_lightning.models.batching import TOKEN_BUDGET, by_length
from prune_lightning.models.generating import generation_settings
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.packing import parts, shares_beginnings
from prune_lightning.models.prefilled import Prefilled, prefills

PREFILLED = "prompts with shared beginnings"


@dataclass(frozen=True)
class Continuation:
    """A model's continuation of a prompt.

    Args:
        ids: The new tokens up to and including the one that completes a stop text, or up to an end token.
        text: The new text, cut after the first stop text.
        finite: Whether all its logits were finite; otherwise it ends before the first that were not.
    """

    ids: tuple[int, ...]
    text: str
    finite: bool = True


@dataclass(frozen=True)
class TopK:
    """Sampling from the ``k`` likeliest tokens.

    Each row has its own generator, so that its sample depends on its seed and not on the batch.

    Args:
        k: Number of tokens to choose from.
        seeds: One per prompt.
    """

    k: int
    seeds: Sequence[int]


class _Rows:
    """The rows of one batch during generation: which are done, and which had non-finite logits."""

    def __init__(
        self, model: LanguageModel, start: int, limits: list[int], stops: Sequence[str], sampling: TopK | None
    ) -> None:
        self.tokens, self.start, self.limits, self.stops, self.sampling = model.tokens, start, limits, stops, sampling
        self.finite_until = list(limits)
        self.noise = [torch.Generator().manual_seed(seed) for seed in sampling.seeds] if sampling else []

    def scores(self, step: int, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Record non-finite rows. Under sampling, add Gumbel noise, so that the argmax is a draw from the softmax."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # noise in 16 bits would have ties
        for place in (~torch.isfinite(scores.logsumexp(-1))).nonzero().flatten().tolist():
            self.finite_until[rows[place]] = min(self.finite_until[rows[place]], step)
        if self.sampling is None:
            return scores
        top, index = scores.topk(min(self.sampling.k, scores.shape[1]))
        uniform = torch.stack([torch.rand(top.shape[1], generator=self.noise[row]) for row in rows])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        return torch.full_like(scores, -torch.inf).scatter(1, index, top + noise.to(top))

    def done(self, new: list[list[int]], rows: Sequence[int]) -> list[bool]:
        """Return which of some rows have reached a stop text, their limit, or non-finite logits."""
        done = [len(ids) >= min(self.limits[i], self.finite_until[i]) for ids, i in zip(new, rows, strict=True)]
        if self.stops:
            texts = self.tokens.tokenizer.batch_decode(new, skip_special_tokens=True)
            done = [over or self._stopped(text) for over, text in zip(done, texts, strict=True)]
        return done

    def _stopped(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)

    def continuation(self, row: int, new: list[int], ends: set[int]) -> Continuation:
        """Return a row's continuation up to its natural end, without the padding after it."""
        usable = new[: min(self.limits[row], self.finite_until[row])]
        ids = usable[: next((i for i, token in enumerate(usable) if token in ends), len(usable))]
        finite = len(ids) < len(usable) or self.finite_until[row] >= self.limits[row]
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
        return self.rows.scores(input_ids.shape[1] - self.rows.start, scores, range(len(scores)))


class _Done(StoppingCriteria):
    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        done = self.rows.done(input_ids[:, self.rows.start :].tolist(), range(len(input_ids)))
        return torch.tensor(done, device=input_ids.device)


def check_room(what: str, model: LanguageModel, new_tokens: int) -> None:
    """Check that a number of new tokens leaves room for a prompt.

    Args:
        what: What asks for them, for the message.
        model: The language model.
        new_tokens: Their number.

    Raises:
        UserError: They fill the model's context.
    """
    if new_tokens >= model.tokens.max_length:
        raise UserError(f"{what}: {new_tokens} new tokens leave no room in a context of {model.tokens.max_length}")


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stops: Sequence[str] = (),
    sampling: TopK | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Continuation]:
    """Continue prompts, each until its natural end.

    A row ends at an end token, after a stop text, or at its limit. The checkpoint's own generation settings are
    ignored. Rows are padded on the left.

    Args:
        model: The language model.
        prompts: Token ids; a prompt too long for the context loses its first tokens.
        limits: Largest number of new tokens of each prompt; may be 0.
        stops: Texts after which a continuation ends.
        sampling: Sample tokens; ``None`` for greedy decoding.
        token_budget: Padded tokens per forward pass.

    Raises:
        UserError: A limit that fills the model's context.
    """
    check_room("decoding", model, max(limits, default=0))
    room = model.tokens.max_length - max(limits, default=0)
    results = [Continuation((), "")] * len(prompts)
    wanted = [i for i, limit in enumerate(limits) if limit > 0]
    asked = model.asked([(prompts[i], len(prompts[i])) for i in wanted])
    cut = {i: list(ids)[-room:] for i, (ids, _) in zip(wanted, asked, strict=True)}
    for places, context in parts(model, list(cut.values()), token_budget):
        part = [wanted[place] for place in places]
        with context, generation_settings(model) as ends:
            for group in by_length([len(cut[i]) + limits[i] for i in part], token_budget):
                chosen = [part[place] for place in group]
                run = [cut[i] for i in chosen]
                drawn = TopK(sampling.k, [sampling.seeds[i] for i in chosen]) if sampling else None
                rows = _Rows(model, max(map(len, run)), [limits[i] for i in chosen], stops, drawn)
                # A memory has to know where each prompt ends, which only whole rows show.
                shares = shares_beginnings(model) and model.fast_path.holds(PREFILLED, partial(prefills, model))
                generated = (_continued if shares else _generated)(model, run, rows, ends)
                for row, i in enumerate(chosen):
                    results[i] = rows.continuation(row, generated[row], ends)
    return results


def _generated(model: LanguageModel, prompts: list[list[int]], rows: _Rows, ends: set[int]) -> list[list[int]]:
    """Return new tokens by the model's own ``generate``; what follows a row's end is arbitrary."""
    ids, mask = model.tokens.pad([row[::-1] for row in prompts], model.device)
    generated = model.model.generate(
        input_ids=ids.flip(1),
        attention_mask=mask.flip(1),
        max_new_tokens=max(rows.limits),
        logits_processor=[_Choose(rows)],
        stopping_criteria=[_Done(rows)],
    )
    return [row[ids.shape[1] :].tolist() for row in generated]


def _continued(model: LanguageModel, prompts: list[list[int]], rows: _Rows, ends: set[int]) -> list[list[int]]:
    """Return the same, with beginnings that prompts share computed once; rows that end leave the batch."""
    new: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    prefilled = Prefilled(model, prompts)
    logits = prefilled.logits
    for step in range(max(rows.limits)):
        chosen = rows.scores(step, logits, active).argmax(-1)
        for row, token in zip(active, chosen.tolist(), strict=True):
            new[row].append(token)
        done = rows.done([new[row] for row in active], active)
        going = [k for k, row in enumerate(active) if not (done[k] or new[row][-1] in ends)]
        if not going:
            break
        if len(going) < len(active):
            kept = torch.tensor(going, device=chosen.device)
            active, chosen = [active[k] for k in going], chosen[kept]
            prefilled.select(kept)
        logits = prefilled.append(chosen)
    return new
