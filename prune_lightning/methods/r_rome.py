"""R-ROME: ROME with the mean key as the only key (Gupta et al., 2024, https://arxiv.org/abs/2403.07175)."""

from __future__ import annotations

from torch import Tensor

from prune_lightning.methods.rome import ROME


class RROME(ROME):
    r"""ROME with the mean key in place of both keys:

    .. math:: \Delta = \frac{(v^* - W \bar k)\, u^\top}{u^\top \bar k}

    The denominator :math:`\propto \bar k^\top C^{-1} \bar k` is positive, so no update can explode.
    """

    def choose(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean key twice."""
        return keys.mean(0), keys.mean(0)
