"""AlphaEdit: null-space constrained editing (Fang et al., ICLR 2025, https://arxiv.org/abs/2410.02355)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.costs import protecting
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.methods.protected_keys import KeyProtectingEdit
from prune_lightning.ranges import Positive
from prune_lightning.types import LowRankUpdate


class AlphaEdit(KeyProtectingEdit):
    r"""Write only into the null space of the preserved knowledge, and protect earlier edits:

    .. math:: \Delta = R K^\top P\,(K K^\top P + A P + \rho I)^{-1}, \qquad A = \sum \tilde K \tilde K^\top

    with :math:`P` the projector onto the eigenvectors of :math:`C` whose eigenvalues are below :math:`\tau`, and
    :math:`\tilde K` the keys of the earlier batches as they were after their batch. Computed recursively: from
    :math:`Q = P/\rho`, :math:`\Delta = R\,(I + K^\top Q K)^{-1} K^\top Q`, then :math:`Q` is updated with :math:`\tilde
    K`.

    Args:
        null_threshold: :math:`\tau`, in the units of :math:`C`; the projector's rank depends on it and on the
            statistics, and is reported (``facts``).
        ridge: :math:`\rho` (``L2``).
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.
    """

    def __init__(self, *, null_threshold: Positive = 0.02, ridge: Positive = 10.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (null_threshold > 0 and ridge > 0):
            raise UserError(
                f"AlphaEdit expects a positive `null_threshold` and `ridge`, but got {null_threshold} and {ridge}"
            )
        self.null_threshold, self.ridge = null_threshold, ridge
        self._null: dict[int, Tensor] = {}

    @classmethod
    def cost(cls, model: Shapes, stream: StreamShape, **options: Any) -> Cost:
        """Return the costs: a growing inverse and the basis of the null space per layer."""
        return protecting(super().cost(model, stream, **options), 2, stream.batch)

    def prepare(self) -> None:
        """Find the null space of each layer."""
        super().prepare()
        for layer in self.layers:
            values, vectors = self.moments[layer].eigen()
            rounding = (
                64 * torch.finfo(values.dtype).eps * values.max()
            )  # of eigenvalues; one at the threshold is not below
            self._null[layer] = vectors[:, values < self.null_threshold - rounding]
            self.facts[f"projector_rank/{layer}"] = rank = self._null[layer].shape[1]
            if not rank:
                raise UserError(
                    f"AlphaEdit finds no null space at layer {layer}: no eigenvalue of the second moment is below "
                    f"method.null_threshold={self.null_threshold}; the smallest is {float(values.min()):.3g}"
                )
        self.forget()

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Solve the ``b x b`` system."""
        return regression_update(residual, keys, self.protected[layer].solve(keys), damping=1.0)

    def unprotected_inverse(self, layer: int) -> Tensor:
        r"""Return :math:`P/\rho`."""
        null = self._null[layer]
        return null @ null.T / self.ridge
