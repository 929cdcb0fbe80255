r"""Filters that keep a change of a matrix out of the leading directions of the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.errors import UserError, one_of
from prune_lightning.spectral.accumulated import AccumulatedChange
from prune_lightning.spectral.diagnostics import singular_values
from prune_lightning.spectral.factored import FactoredMatrix
from prune_lightning.spectral.triplets import NonFiniteChange, Triplets, fp64, triplets_above
from prune_lightning.types import LowRankUpdate

ENERGIES = ("sigma", "sigma2")
_EQUAL = 1e-12  # relative difference up to which two singular values count as one


def leading_directions(matrix: Tensor, share: float, energy: str = "sigma2", unit_rows: bool = False) -> Triplets:
    r"""Return the fewest leading singular triplets that hold a share of a matrix's energy.

    Equal singular values are never separated: the directions that belong to them are not determined one by one.

    Args:
        matrix: Shape ``(out_features, in_features)``.
        share: :math:`\tau` in (0, 1]: the smallest :math:`k` with :math:`\sum_{i \le k} e_i \ge \tau \sum_i e_i`.
        energy: :math:`e_i`: ``sigma`` or ``sigma2``.
        unit_rows: Scale every row to length one first.

    Raises:
        UserError: The matrix is zero or not finite.

    >>> leading_directions(torch.diag(torch.tensor([3.0, 2.0, 1.0])), share=0.6).sigma
    tensor([3.], dtype=torch.float64)
    """
    one_of("restraint.energy", energy, ENERGIES)
    matrix = fp64(matrix)
    if unit_rows:
        matrix = matrix / (torch.linalg.vector_norm(matrix, dim=1, keepdim=True) + 1e-8)
    sigma = singular_values(matrix)
    if not sigma[0] > 0:
        raise UserError("a matrix that is zero or not finite has no leading directions")
    held = (sigma if energy == "sigma" else sigma.square()).cumsum(0)
    last = sigma[min(len(sigma) - 1, int((held < share * held[-1]).sum()))]
    below = sigma[sigma < last * (1 - _EQUAL)]
    return triplets_above(matrix, float(last + below[0]) / 2 if len(below) else float(last) / 2)


@dataclass(frozen=True)
class Subspace:
    r"""Directions that a change is kept out of, :math:`\Delta \mapsto (I-\alpha UU^\top)\,\Delta\,(I-\alpha VV^\top)`.

    The filter is linear, so filtering a sum filters each of its terms. For :math:`\alpha = 1` it is an orthogonal
    projection.

    Args:
        left: :math:`U`, orthonormal columns, shape ``(out_features, j)``, fp64; ``None`` for no filter on this side.
        right: :math:`V`, orthonormal columns, shape ``(in_features, k)``, fp64; ``None`` for no filter on this side.
        strength: :math:`\alpha`.
    """

    left: Tensor | None
    right: Tensor | None
    strength: float = 1.0

    @property
    def num_directions(self) -> int:
        """Number of directions, of both sides."""
        return sum(side.shape[1] for side in (self.left, self.right) if side is not None)

    def removed(self, change: Tensor | AccumulatedChange | FactoredMatrix) -> LowRankUpdate | None:
        r"""Return what the filter takes out of a change, in factors; ``None`` for a zero change.

        .. math:: \alpha UU^\top\Delta + \alpha\,(I-\alpha UU^\top)\,\Delta\,VV^\top

        Its rank is at most the number of directions, and at most twice the rank of the change; the smaller form is
        returned. For a change of rank :math:`r` that takes :math:`O((m+n)(j+k)\,r)`.

        Args:
            change: :math:`\Delta`.

        Raises:
            NonFiniteChange: The change holds NaN or infinity.
        """
        if isinstance(change, AccumulatedChange):
            change = change.factored() or change.master
        if isinstance(change, Tensor):
            return self._from_products(fp64(change))
        left, right = change.left.vectors @ change.core, change.right.vectors
        sides = (self.left is not None) + (self.right is not None)
        if not change.rank:
            return None
        if sides * right.shape[1] <= self.num_directions:
            return self._from_factors(left, right)
        return self._concatenated(lambda v: left @ (right.T @ v), lambda u: right @ (left.T @ u))

    def _from_products(self, change: Tensor) -> LowRankUpdate | None:
        if not torch.isfinite(change).all():
            raise NonFiniteChange("the change of the weights holds NaN or infinity; it cannot be filtered")
        return self._concatenated(lambda v: change @ v, lambda u: change.T @ u) if change.any() else None

    def _concatenated(self, times: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor]) -> LowRankUpdate:
        """Return the form whose rank is the number of directions, from products with the change."""
        parts = []
        if self.left is not None:
            parts.append(LowRankUpdate(self.left, self.strength * transposed(self.left)))
        if self.right is not None:
            parts.append(LowRankUpdate(self.strength * self._without_left(times(self.right)), self.right))
        return LowRankUpdate.sum(parts)

    def _from_factors(self, left: Tensor, right: Tensor) -> LowRankUpdate:
        r"""Return the form whose rank is that of the change :math:`AB^\top` for each side that is filtered."""
        rest = self._without_left(left)
        parts = []
        if self.left is not None:
            parts.append(LowRankUpdate(left - rest, right))
        if self.right is not None:
            parts.append(LowRankUpdate(rest, self.strength * (self.right @ (self.right.T @ right))))
        return LowRankUpdate.sum(parts)

    def _without_left(self, vectors: Tensor) -> Tensor:
        return vectors if self.left is None else vectors - self.strength * (self.left @ (self.left.T @ vectors))
