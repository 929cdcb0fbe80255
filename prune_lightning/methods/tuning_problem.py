"""Logits as a function of down-projections, or of anything above a block, for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.fast_path import agrees
from prune_lightning.models.hooks import capture, replace_weight
from prune_lightning.models.language_model import LanguageModel


class WeightProblem(Protocol):
    """Logits at the positions of a batch as a function of the edited down-projections."""

    def logits(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the logits, shape ``(n, vocabulary)``.

        Args:
            weights: By layer, ``(out_features, in_features)``; cast to the model's dtype.
        """
        ...


class WholeWeights:
    """The plain path: run the whole model at every step."""

    def __init__(self, model: LanguageModel, batch: TargetBatch) -> None:
        self.model, self.batch = model, batch

    def logits(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the logits at the positions of the batch."""
        with ExitStack() as stack:
            for layer, weight in weights.items():
                stack.enter_context(replace_weight(self.model.rewrite_module(layer), weight))
            batch = self.batch
            return self.model.logits_at(batch.ids, batch.mask, batch.rows, batch.positions)


class UpperWeights:
    r"""The fast path: run only the lowest down-projection and the blocks above it.

    The input :math:`k` of that down-projection and the rest :math:`r` of its block's output do not depend on the
    weights and are computed once. A step begins at :math:`h = r + N(W k + b)`, with :math:`N` the norm that the
    family's YAML names, if any.

    Args:
        model: The language model.
        layer: The lowest edited layer.
        batch: Where logits are read.
    """

    def __init__(self, model: LanguageModel, layer: int, batch: TargetBatch) -> None:
        self.model, self.layer = model, layer
        self._module, self._after_mlp = model.rewrite_module(layer), model.after_mlp(layer)
        rows, _ = len(batch.ids), model.block_returns_tuple  # read before anything is recorded
        with torch.no_grad(), capture([self._module], [self._module], stop=False, rows=rows) as seen:
            self._above = AboveBlock(model, layer, batch)
        hidden = self._above.forward.hidden
        precise = torch.promote_types(hidden.dtype, torch.float32)
        self._keys = seen.inputs[0]
        with torch.no_grad():
            self._rest = hidden.to(precise) - self._after_mlp(seen.outputs[0]).to(precise)

    def logits(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the logits at the positions of the batch."""
        weight = weights[self.layer].to(self._keys.dtype)
        output = self._after_mlp(functional.linear(self._keys, weight, self._module.bias))
        hidden = (self._rest + output.to(self._rest)).to(output.dtype)
        with ExitStack() as stack:
            for layer, weight in weights.items():
                if layer != self.layer:
                    stack.enter_context(replace_weight(self.model.rewrite_module(layer), weight))
            return self._above.logits(hidden)


class AboveBlock:
    """Logits as a function of anything in the blocks above ``layer``, whose output is computed once.

    Args:
        model: The language model.
        layer: The last block that is not run again.
        batch: Where logits are read.
    """

    def __init__(self, model: LanguageModel, layer: int, batch: TargetBatch) -> None:
        self.batch = batch
        start = torch.zeros_like(batch.ids[:, 0])
        self.forward = CachedForward(model, layer, batch.ids, batch.mask, start, batch.rows, batch.positions)

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """Return the logits at the positions of the batch, with ``hidden`` in place of the block's output if given."""
        hidden = self.forward.hidden if hidden is None else hidden
        return self.forward.logits_at(hidden, self.batch.rows, self.batch.positions)


def logits_above(model: LanguageModel, layer: int, batch: TargetBatch, kind: str, fast: bool) -> Callable[[], Tensor]:
    """Return a function that computes the logits of a batch; blocks below ``layer`` are run once, if that is possible.

    Args:
        model: The language model.
        layer: The lowest block in which something changes.
        batch: Where logits are read.
        kind: Name of the fast path, see :class:`~prune_lightning.models.fast_path.FastPath`.
        fast: Whether to try it.
    """

    @torch.no_grad()
    def upper() -> Callable[[], Tensor] | None:
        above = AboveBlock(model, layer - 1, batch)
        return above.logits if agrees(above.logits(), above.forward.base_logits) else None

    if fast and layer and (found := model.fast_path.attempt(kind, upper)):
        return found
    return lambda: model.logits_at(batch.ids, batch.mask, batch.rows, batch.positions)
