"""Reruns only the upper part of a forward pass: the blocks above a layer, for the later tokens of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prune_lightning.models.fast_path import agrees
from prune_lightning.models.hooks import capture, capture_keywords, only_at, pass_through, replace_output
from prune_lightning.models.key_value_cache import with_cache
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.lean_blocks import LeanBlock, LeanBlocks, Places, is_lean, linear_modules
from prune_lightning.models.packed_weights import Plain, packs
from prune_lightning.models.packing import PAYS, arrangements, plain

LEAN = "lean blocks"


class CachedForward:
    """The model above block ``layer``, as a function of the block's output from each row's position ``start`` on.

    Hidden states up to the block, and keys and values of the tokens before ``start`` in the blocks above, do not depend
    on it and are computed once. A rerun calls the model's own ``forward`` on the later tokens, with the lower blocks
    replaced by the identity. So the model itself handles masks, rotary positions, sliding windows and soft caps.

    Args:
        model: The language model.
        layer: The block after which the rerun begins.
        ids: Right-padded ids, shape ``(rows, length)``.
        mask: One where ``ids`` is not padding.
        start: First position of each row to rerun, shape ``(rows,)``.
        rows: Row of each position whose logits are read, shape ``(n,)``.
        positions: These positions, not before their row's ``start``, shape ``(n,)``.
        above: Higher blocks after which a rerun may begin, too; see :meth:`behind`.
        compact: Whether to compute prefixes that rows share only once, leave out padding, and run the last block's MLP
            only where logits are read. On a CPU, blocks of the commonest kind run as
            :class:`~prune_lightning.models.lean_blocks.LeanBlocks`. Hooks that read or change activations need whole
            rows (``False``).

    Attributes:
        base_logits: Logits at these positions in the ordinary forward pass, shape ``(n, vocabulary)``.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        layer: int,
        ids: Tensor,
        mask: Tensor,
        start: Tensor,
        rows: Tensor,
        positions: Tensor,
        above: Sequence[int] = (),
        compact: bool = False,
    ) -> None:
        self.model, self.layer, self._compact = model, layer, compact
        self._in_tuple = model.block_returns_tuple  # read here, before hooks are installed
        layers = [layer, *above]
        modules = [module for kept in layers for module in (model.block(kept), model.rewrite_module(kept))]
        lengths = mask.sum(1)
        for packed in arrangements(model, ids, mask) if compact else [plain(ids, mask)]:
            cache: Any = DynamicCache()
            read, at = packed.find(rows, positions)
            with capture(outputs=modules, stop=False, rows=len(packed.inputs["input_ids"])) as seen:
                self.base_logits = model.logits_at(
                    **packed.inputs, rows=read, positions=at, **with_cache(model.model, cache)
                )
            if bool(self.base_logits.isfinite().all()):
                break
        self._read: tuple[Tensor, Tensor, list[tuple[nn.Module, Tensor]]] | None = None
        self._lean: tuple[Tensor, Tensor, LeanBlocks | None] | None = None
        row = torch.arange(len(ids), device=ids.device)

        # Later tokens begin at slot 0 of the rerun, and earlier ones end right before it, padded on the left. So the
        # distance of two tokens equals that of their slots, as sliding windows require.
        before, after = int(start.max()), int((lengths - start).max())
        self._positions = (start[:, None] + torch.arange(after, device=ids.device)).clamp_max(ids.shape[1] - 1)
        self._kept = {
            kept: (
                seen.outputs[2 * i][packed.find(row[:, None], self._positions)],
                seen.outputs[2 * i + 1][packed.find(row, start)],
            )
            for i, kept in enumerate(layers)
        }
        earlier = torch.arange(before, device=ids.device) - (before - start)[:, None]
        later = torch.arange(after, device=ids.device) < (lengths - start)[:, None]
        self._mask = torch.cat([earlier >= 0, later], dim=1).to(mask.dtype)
        where = packed.find(row[:, None], earlier.clamp_min(0))
        self._past = [
            tuple(t.transpose(1, 2)[where].transpose(1, 2).contiguous() for t in (level.keys, level.values))
            for level in cache.layers[layer + 1 :]
        ]

    @property
    def hidden(self) -> Tensor:
        """Output of the block from ``start`` on, shape ``(rows, longest rest, width)``."""
        return self._kept[self.layer][0]

    def later(self, hidden: Tensor) -> Tensor:
        """Return hidden states of whole rows, ``(rows, length, width)``, from ``start`` on."""
        return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], self._positions]

    @property
    def mlp_output(self) -> Tensor:
        """Output of the block's down-projection at ``start``, shape ``(rows, width)``."""
        return self._kept[self.layer][1]

    def behind(self, layer: int) -> CachedForward:
        """Return a rerun after ``layer`` or one of the blocks ``above``, which shares the cached states."""
        other = copy(self)
        other._read = other._lean = None
        other.layer, other._past = layer, self._past[layer - self.layer :]
        return other

    @property
    def _before(self) -> int:
        return self._mask.shape[1] - self.hidden.shape[1]

    def select(self, rows: Tensor) -> None:
        """Keep some rows, possibly repeated, and truncate to the longest of them."""
        self._read = self._lean = None
        mask = self._mask[rows]
        before = self._before
        drop = before - int(mask[:, :before].sum(1).max()) if before else 0
        rest = int(mask[:, before:].sum(1).max())
        self._mask = mask[:, drop : before + rest]
        self._positions = self._positions[rows, :rest]
        self._kept = {layer: (hidden[rows, :rest], mlp[rows]) for layer, (hidden, mlp) in self._kept.items()}
        self._past = [tuple(t[rows, :, drop:] for t in pair) for pair in self._past]

    def logits_at(self, hidden: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Run the upper blocks.

        Args:
            hidden: In place of :attr:`hidden`, same shape.
            rows: Row of each place, shape ``(n,)``.
            offsets: Its position, counted from the row's ``start``, shape ``(n,)``.

        Returns:
            Logits, shape ``(n, vocabulary)``.
        """
        lean = self._lean_blocks(rows, offsets) if self._compact else None
        if lean is None:
            return self._rerun(hidden, rows, offsets)

        def same() -> bool:
            with torch.no_grad():
                return agrees(self._beyond(lean(hidden), rows, offsets), self._rerun(hidden, rows, offsets))

        if not self.model.fast_path.holds(LEAN, same):
            return self._rerun(hidden, rows, offsets)
        return self._beyond(lean(hidden), rows, offsets)

    def _rerun(self, hidden: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Run the model's own blocks."""
        below = [self.model.block(index) for index in range(self.layer)]
        with ExitStack() as stack:
            stack.enter_context(pass_through(below, self._in_tuple))
            stack.enter_context(replace_output(self.model.block(self.layer), self._output(hidden)))
            for mlp, places in self._places(rows, offsets) if self._compact else ():
                stack.enter_context(only_at(mlp, places))
            return self.model.logits_at(*self._inputs, rows, offsets, **(self._cached() | self._options))

    def _beyond(self, hidden: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Run what follows the last block."""
        *below, last = (self.model.block(index) for index in range(self.model.num_layers))
        with pass_through(below, self._in_tuple), replace_output(last, self._output(hidden)):
            ids, later = self._inputs[0], self._mask[:, self._before :]
            return self.model.logits_at(ids, later, rows, offsets, **self._options)

    def _output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._in_tuple else hidden

    @property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self._positions), self._mask

    @property
    def _options(self) -> dict[str, Any]:
        return {"position_ids": self._positions} if self.model.takes_positions else {}

    def _cached(self) -> dict[str, Any]:
        return with_cache(self.model.model, self._cache())

    def _lean_blocks(self, rows: Tensor, offsets: Tensor) -> LeanBlocks | None:
        """Return the upper blocks in lean form, or ``None`` if they have none; found once while the places are same."""
        if self._lean is None or self._lean[0] is not rows or self._lean[1] is not offsets:
            self._lean = rows, offsets, self._built(rows, offsets)
        return self._lean[2]

    @torch.no_grad()
    def _built(self, rows: Tensor, offsets: Tensor) -> LeanBlocks | None:
        above = [self.model.block(index) for index in range(self.layer + 1, self.model.num_layers)]
        fits = not self.hidden.is_cuda and self.hidden.dtype in (torch.float32, torch.float64)
        if not (above and fits and self.model.takes_positions and all(map(is_lean, above))):
            return None
        # The model computes masks and rotations itself, and passes them to its blocks.
        everything = [self.model.block(index) for index in range(self.model.num_layers)]
        with pass_through(everything, self._in_tuple), capture_keywords(above) as seen:
            self.model.logits_at(*self._inputs, rows[:1], offsets[:1], **(self._cached() | self._options))
        if not all({"attention_mask", "position_embeddings"} <= set(kwargs) for kwargs in seen):
            return None
        places = Places.of(self._mask[:, self._before :], rows, offsets)
        linear = [module for block in above for together in linear_modules(block) for module in together]
        product = self.model.fast_path.packed.product if packs(linear) else Plain
        given = [(kwargs["attention_mask"], kwargs["position_embeddings"]) for kwargs in seen]
        blocks = [
            LeanBlock(block, past, mask, rotation, places, block is above[-1], product)
            for block, past, (mask, rotation) in zip(above, self._past, given, strict=True)
        ]
        return LeanBlocks(blocks, places)

    def _places(self, rows: Tensor, offsets: Tensor) -> Sequence[tuple[nn.Module, Tensor]]:
        """Return the MLPs with the tokens they need; found once while the same positions are read, since it waits."""
        if self._read is None or self._read[0] is not rows or self._read[1] is not offsets:
            self._read = rows, offsets, list(self._narrowed(rows, offsets))
        return self._read[2]

    def _narrowed(self, rows: Tensor, offsets: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield the MLPs of the upper blocks with the tokens they need, where leaving out the rest is faster."""
        later = self._mask[:, self._before :]
        real, read = torch.nonzero(later.flatten())[:, 0], (rows * later.shape[1] + offsets).unique()
        for index in range(self.layer + 1, self.model.num_layers):
            places = read if index == self.model.num_layers - 1 else real
            mlp = self.model.mlp(index)
            if mlp is not None and len(places) <= PAYS * later.numel():
                yield mlp, places

    def _cache(self) -> DynamicCache:
        cache = DynamicCache()
        if self._before:
            # The model reads the past length from the cache of its first layers, which are not run here.
            nothing = self.hidden.new_zeros(1, 1, self._before, 1)
            for index in range(self.layer + 1):
                cache.update(nothing, nothing, index)
            for index, (keys, values) in enumerate(self._past, start=self.layer + 1):
                cache.update(keys, values, index)
        return cache
