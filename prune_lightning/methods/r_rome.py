"""R-ROME: ROME with one key throughout (Gupta et al., 2024, https://arxiv.org/abs/2403.07175)."""

from __future__ import annotations

from torch import Tensor

from prune_lightning.methods.rome import ROME


class RROME(ROME):
    r"""ROME in which the mean key stands wherever a key does:

    .. math:: \Delta = \frac{(v^* - W \bar k)\, u^\top}{u^\top \bar k}

    The denominator :math:`\propto \bar k^\top C^{-1} \bar k` is positive, so no update can explode.
    """

    def choose(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean key twice."""
        return keys.mean(0), keys.mean(0)
