r"""The linear algebra of the batch methods: map keys to residuals with the least change for all other keys."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lightning.models.second_moment import Keep
from prune_lightning.types import LowRankUpdate

# Squared sine between keys, in the metric of the system, up to which they count as one. The same key that an fp32 model
# computes in two rows of a batch differs by 1e-7, and by more in directions of little variance.
_COINCIDE = 1e-10


def regression_update(residual: Tensor, keys: Tensor, solved: Tensor, damping: float) -> LowRankUpdate:
    r"""Return :math:`\Delta = R\,(\alpha I + K^\top M^{-1} K)^{-1} (M^{-1}K)^\top` in factors, fp64.

    It minimises :math:`\|\Delta K - R\|^2 + \alpha \operatorname{tr}(\Delta M \Delta^\top)`; for :math:`\alpha = 0`
    it is the cheapest :math:`\Delta` with :math:`\Delta K = R`. Only a ``b x b`` system is solved. If keys coincide, as
    those of one subject do, no :math:`\Delta` gives each its own residual: they get the mean. Keys that are not finite
    give an update that is not.

    Args:
        residual: :math:`R`, shape ``(out_features, b)``.
        keys: :math:`K`, shape ``(in_features, b)``.
        solved: :math:`M^{-1} K`, same shape; :math:`M` may be singular if this is in its range.
        damping: :math:`\alpha \ge 0`.
    """
    system = keys.T @ solved
    system = (system + system.T) / 2
    system.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(system)
    coincide = failed > 0
    if not damping:  # a pivot that is rounding alone can be positive
        coincide = coincide | (factor.diagonal().square() <= _COINCIDE * system.diagonal()).any()
    if coincide.item():  # the least-norm solution, or NaN, on which an eigenvalue solver may fail
        finite = bool(torch.isfinite(system).all())
        inverse = torch.linalg.pinv(system, rtol=_COINCIDE, hermitian=True) if finite else system * torch.nan
        right = solved @ inverse
    else:
        right = torch.cholesky_solve(solved.T, factor).T
    return LowRankUpdate(residual, right)


class RecursiveInverse:
    r"""The inverse :math:`Q` of a matrix that grows by the keys written so far (recursive least squares).

    .. math:: Q \leftarrow Q - QK\,(I + K^\top Q K)^{-1} K^\top Q = (Q^{-1} + KK^\top)^{-1}

    Time and memory per update do not grow with the number of keys.

    Args:
        inverse: :math:`Q`, symmetric, shape ``(n, n)``; modified in place.
        keep: Where it is kept; keys and results stay where they are.
    """

    def __init__(self, inverse: Tensor, keep: Keep | None = None) -> None:
        self._keep = keep or Keep()
        # One layout, so that a state that was read from the disk rounds in products as this one does.
        self.inverse = self._keep.place(inverse).contiguous()

    def to(self, device: torch.device) -> RecursiveInverse:
        """Move to a device, in place; what is kept on the CPU stays there."""
        if not self._keep.on_cpu:
            self.inverse = self.inverse.to(device)
        return self

    def solve(self, keys: Tensor) -> Tensor:
        r"""Return :math:`QK` for keys ``(n, b)``."""
        return (self.inverse @ keys.to(self.inverse)).to(keys)

    def add(self, keys: Tensor) -> None:
        """Add keys ``(n, b)``."""
        solved = self.solve(keys)
        system = keys.T @ solved
        system = (system + system.T) / 2
        system.diagonal().add_(1.0)
        # A product of a matrix with its own transpose: Q stays exactly symmetric up to the rounding of the sum.
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(system), solved.T, upper=False)
        half = half.to(self.inverse)
        self.inverse.addmm_(half.T, half, alpha=-1)
