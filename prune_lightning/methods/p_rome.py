"""p-ROME: ROME with the clean prompt's key as the only key (Gupta et al., 2024, https://arxiv.org/abs/2403.07175)."""

from __future__ import annotations

from torch import Tensor

from prune_lightning.methods.rome import ROME


class PROME(ROME):
    r"""ROME with the clean prompt's key in place of both keys:

    .. math:: \Delta = \frac{(v^* - W k)\, u^\top}{u^\top k}, \qquad u \propto C^{-1} k
    """

    def choose(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clean prompt's key twice."""
        return keys[0], keys[0]
