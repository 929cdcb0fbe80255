"""MEMIT: mass editing of memory (Meng et al., ICLR 2023, https://arxiv.org/abs/2210.07229)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.costs import protecting
from prune_lightning.methods.layerwise import LayerwiseEdit
from prune_lightning.methods.least_squares import RecursiveInverse, regression_update
from prune_lightning.types import EditRequest, LowRankUpdate


class MEMIT(LayerwiseEdit):
    r"""Ridge regression against the second moment (eq. 14):

    .. math:: \Delta = R K^\top (\lambda C + K K^\top)^{-1} = R\,(\lambda I + K^\top C^{-1} K)^{-1} K^\top C^{-1}

    Args:
        ridge: :math:`\lambda`, the weight of the second moment (``mom2_update_weight``).
        accumulate_past_keys: Protect earlier edits: add :math:`\sum \tilde K \tilde K^\top` over the keys of all
            batches so far, as they are after their batch was written ("MEMIT-seq" in AlphaEdit's comparison).
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.
    """

    def __init__(self, *, ridge: float, accumulate_past_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ridge > 0:
            raise UserError(f"MEMIT's `ridge` is expected to be positive, but got {ridge}")
        self.ridge, self.accumulate_past_keys = ridge, accumulate_past_keys
        self._past: dict[int, RecursiveInverse] = {}

    @classmethod
    def cost(cls, model: Shapes, stream: StreamShape, *, accumulate_past_keys: bool = False, **options: Any) -> Cost:
        """Return the costs; with past keys, an inverse per layer grows."""
        found = super().cost(model, stream, **options)
        return protecting(found, 1, stream.batch) if accumulate_past_keys else found

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Solve the ``b x b`` system."""
        if layer in self._past:
            return regression_update(residual, keys, self._past[layer].solve(keys), damping=1.0)
        return regression_update(residual, keys, self.moments[layer].solve(keys), damping=self.ridge)

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the keys of the batch, if past keys are to be protected."""
        return self.present_keys(requests) if self.accumulate_past_keys else {}

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Take up the keys of a batch."""
        for name, keys in observed.items():
            layer = int(name)
            if layer not in self._past:
                self._past[layer] = RecursiveInverse(self.moments[layer].inverse() / self.ridge)
            self._past[layer].add(keys)

    def memory(self) -> Mapping[str, Tensor]:
        """Return the inverses, by layer."""
        return {str(layer): past.inverse for layer, past in self._past.items()}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Take up the inverses."""
        self._past = {int(layer): RecursiveInverse(inverse.clone()) for layer, inverse in memory.items()}

    def forget(self) -> None:
        """Forget the keys of earlier batches."""
        self._past = {}
