"""EMMET: equality-constrained mass model editing (Gupta et al., 2024, https://arxiv.org/abs/2403.14236)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.methods.layerwise import LayerwiseEdit
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.ranges import NonNegative, Positive
from prune_lightning.types import LowRankUpdate


class EMMET(LayerwiseEdit):
    r"""ROME's equality constraint for a batch: the least change to all other keys with :math:`\Delta K = R`,

    .. math:: \Delta = R\,(K^\top (wC)^{-1} K + \alpha I)^{-1} K^\top (wC)^{-1}

    With :math:`\alpha = 0`, and for a single edit, the constraint holds exactly, whatever :math:`w`. With
    :math:`\alpha > 0` this is MEMIT with :math:`\lambda = \alpha w`.

    Args:
        damping: :math:`\alpha` (``emmet_lambda``); used for batches of two and more.
        weight: :math:`w` (``mom2_update_weight``).
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.
    """

    def __init__(self, *, damping: NonNegative = 0.1, weight: Positive = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if damping < 0 or not weight > 0:
            raise UserError(f"EMMET expects `damping` >= 0 and `weight` > 0, but got {damping} and {weight}")
        self.damping, self.weight = damping, weight

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Solve the ``b x b`` system."""
        damping = self.damping if keys.shape[1] > 1 else 0.0
        return regression_update(residual, keys, self.moments[layer].solve(keys) / self.weight, damping)
