"""Logits as a function of down-projections, or of anything above a block, for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.fast_path import agrees
from prune_lightning.models.hooks import capture, edit_output, replace_weight
from prune_lightning.models.language_model import LanguageModel

Change = Callable[[Tensor], Tensor]


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


class UpperOutput:
    r"""Logits as a function of a down-projection's output; only the blocks above run again.

    The output :math:`y` as it is and the rest :math:`r` of its block's output are computed once. A step begins at
    :math:`h = r + N(y')`, with :math:`N` the norm that the family's YAML names, if any.

    Args:
        model: The language model.
        layer: Layer of the down-projection.
        batch: Where logits are read.
        start: First position of each row at which the output changes, shape ``(rows,)``; zero by default.

    Attributes:
        keys: Input of the down-projection, shape ``(rows, length, in_features)``.
        base_logits: Logits at the positions of the batch with the output as it is, shape ``(n, vocabulary)``.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, layer: int, batch: TargetBatch, start: Tensor | None = None) -> None:
        module, self._after_mlp = model.rewrite_module(layer), model.after_mlp(layer)
        with capture([module], [module, model.block(layer)], rows=len(batch.ids)) as seen:
            model(batch.ids, batch.mask)
        self.keys, self._output, hidden = seen.inputs[0], seen.outputs[0], seen.outputs[1]
        self._dtype, precise = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
        self._rest = hidden.to(precise) - self._after_mlp(self._output).to(precise)
        self._above = AboveBlock(model, layer, batch, start, compact=True)
        self.base_logits = self._above.forward.base_logits

    def logits(self, change: Change) -> Tensor:
        """Return the logits, shape ``(n, vocabulary)``, with ``change(output)`` in place of the output."""
        output = self._after_mlp(change(self._output))
        return self._above.logits((self._rest + output.to(self._rest)).to(self._dtype))


class UpperWeights:
    """The fast path: run only the lowest down-projection and the blocks above it.

    Args:
        model: The language model.
        layer: The lowest edited layer.
        batch: Where logits are read.
    """

    def __init__(self, model: LanguageModel, layer: int, batch: TargetBatch) -> None:
        self.model, self.layer = model, layer
        self._lowest = UpperOutput(model, layer, batch)

    def logits(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Return the logits at the positions of the batch."""
        keys, bias = self._lowest.keys, self.model.rewrite_module(self.layer).bias
        weight = weights[self.layer].to(keys.dtype)
        with ExitStack() as stack:
            for layer, other in weights.items():
                if layer != self.layer:
                    stack.enter_context(replace_weight(self.model.rewrite_module(layer), other))
            return self._lowest.logits(lambda _: functional.linear(keys, weight, bias))


class AboveBlock:
    """Logits as a function of anything in the blocks above ``layer``, whose output is computed once.

    Args:
        model: The language model.
        layer: The last block that is not run again.
        batch: Where logits are read.
        start: First position of each row that runs again, shape ``(rows,)``; zero by default.
        compact: Whether no activation above is read or changed by hooks, see :class:`~.cached_forward.CachedForward`.
    """

    def __init__(
        self,
        model: LanguageModel,
        layer: int,
        batch: TargetBatch,
        start: Tensor | None = None,
        compact: bool = False,
    ) -> None:
        start = torch.zeros_like(batch.ids[:, 0]) if start is None else start
        self.batch, self._offsets = batch, batch.positions - start[batch.rows]
        self.forward = CachedForward(
            model, layer, batch.ids, batch.mask, start, batch.rows, batch.positions, compact=compact
        )

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """Return the logits at the positions of the batch.

        Args:
            hidden: In place of the block's output, shape ``(rows, length, width)``; that output by default.
        """
        hidden = self.forward.hidden if hidden is None else self.forward.later(hidden)
        return self.forward.logits_at(hidden, self.batch.rows, self._offsets)


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


def logits_of_output(
    model: LanguageModel,
    host: nn.Module,
    layer: int,
    batch: TargetBatch,
    kind: str,
    fast: bool,
    start: Tensor | None = None,
) -> Callable[[Change], Tensor]:
    """Return the logits of a batch as a function of a change of a module's output.

    Args:
        model: The language model.
        host: The module.
        layer: The block that it is in.
        batch: Where logits are read.
        kind: Name of the fast path, see :class:`~prune_lightning.models.fast_path.FastPath`.
        fast: Whether to run only the blocks above, or for another module than the down-projection, its block, too.
        start: First position of each row at which the output changes, shape ``(rows,)``; zero by default.
    """

    def upper() -> Callable[[Change], Tensor] | None:
        problem = UpperOutput(model, layer, batch, start)
        with torch.no_grad():
            return problem.logits if agrees(problem.logits(lambda output: output), problem.base_logits) else None

    if fast and host is model.rewrite_module(layer) and (found := model.fast_path.attempt(kind, upper)):
        return found
    forward = logits_above(model, layer, batch, kind, fast)

    def changed(change: Change) -> Tensor:
        with edit_output(host, change, rows=len(batch.ids)):
            return forward()

    return changed
