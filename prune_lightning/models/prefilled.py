"""Prompts ready to be continued: keys and values of all tokens, with beginnings that prompts share computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prune_lightning.models.fast_path import agrees
from prune_lightning.models.key_value_cache import with_cache
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.packing import arrangements

TOKENS = 1024
"""Tokens of a pass over the prompts; on a CPU, the activations of many more do not stay in its cache."""


class Prefilled:
    """Several prompts, continued by one token each at a time.

    The prompts end at the same slot, padded on the left, so that the distance of two tokens is that of their slots.

    Args:
        model: The language model.
        prompts: Token ids.

    Attributes:
        logits: Logits behind the last token of each prompt, shape ``(n, vocabulary)``.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        slots = torch.arange(int(lengths.max()), device=model.device)
        earlier = slots - (len(slots) - lengths)[:, None]
        self._mask, self._position = (earlier >= 0).long(), lengths[:, None]
        found = [self._pass(prompts[part], earlier[part].clamp_min(0)) for part in _parts(prompts)]
        self.logits = torch.cat([logits for logits, _ in found])
        self._cache: Any = DynamicCache()
        for layer in range(len(found[0][1])):
            parts = [levels.pop(0) for _, levels in found]  # one layer at a time, so that little is held twice
            keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
            self._cache.update(keys, values, layer)

    def _pass(self, prompts: Sequence[Sequence[int]], earlier: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Return the logits of some prompts, and keys and values of each layer, ``(n, heads, slots, size)``."""
        ids, mask = self.model.tokens.pad(prompts, self.model.device)
        row = torch.arange(len(ids), device=ids.device)
        for packed in arrangements(self.model, ids, mask):
            cache = DynamicCache()
            rows, positions = packed.find(row, mask.sum(1) - 1)
            logits = self.model.logits_at(
                **packed.inputs, rows=rows, positions=positions, **with_cache(self.model.model, cache)
            )
            if bool(logits.isfinite().all()):
                break
        where = packed.find(row[:, None], earlier)
        levels: Any = cache.layers
        return logits, [tuple(t.transpose(1, 2)[where].transpose(1, 2) for t in (of.keys, of.values)) for of in levels]

    @torch.no_grad()
    def append(self, tokens: Tensor) -> Tensor:
        """Append a token to each prompt, ``(n,)``, and return the logits behind it, ``(n, vocabulary)``."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._position)], dim=1)
        position = {"position_ids": self._position} if self.model.takes_positions else {}
        logits = self.model.logits_at(
            tokens[:, None],
            self._mask,
            rows,
            torch.zeros_like(rows),
            **with_cache(self.model.model, self._cache),
            **position,
        )
        self._position = self._position + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep some prompts only."""
        self._mask, self._position = self._mask[rows], self._position[rows]
        self._cache.batch_select_indices(rows)


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Yield the passes: adjacent prompts that have :data:`TOKENS` tokens at most, padded, and one at least."""
    start = longest = 0
    for end, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if end > start and (end + 1 - start) * longest > TOKENS:
            yield slice(start, end)
            start, longest = end, len(prompt)
    yield slice(start, len(prompts))


def prefills(model: LanguageModel) -> bool:
    """Whether :class:`Prefilled` gives the model's logits, tried on a few tokens."""
    size = int(model.config.vocab_size)
    prompts = [[token % size for token in ids] for ids in ((1, 2, 3, 4), (1, 2), (5, 6, 7))]
    with torch.no_grad(), model.frozen_mode():
        try:
            found = Prefilled(model, prompts)
            ends = [found.logits]
            new = torch.tensor([8 % size, 9 % size, 1 % size], device=model.device)
            for token in (new, new.roll(1)):
                ends.append(found.append(token))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # a cache of another kind
            return False
        wholes = [[*ids, int(a), int(b)] for ids, a, b in zip(prompts, new, new.roll(1), strict=True)]
        ids, mask = model.tokens.pad(wholes, model.device)
        whole = model(ids, mask)
        rows = torch.arange(len(wholes), device=model.device)
        lengths = mask.sum(1)
        return all(agrees(end, whole[rows, lengths - 3 + i]) for i, end in enumerate(ends))
