r"""One layer's second moment of keys, :math:`C = \frac1N \sum_i k_i k_i^\top`, and linear solves with it."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.devices import to_device
from prune_lightning.errors import UserError


class SecondMoment:
    r"""One layer's second moment, symmetric ``(in_features, in_features)``, fp64, factorised for solving.

    Entries that were summed or stored with relative precision :math:`\epsilon` carry errors
    :math:`|E_{ij}| \le \epsilon \sqrt{C_{ii} C_{jj}}`, so that :math:`\|E\|_2 \le \epsilon \operatorname{tr} C`.
    Eigenvalues up to that bound are only rounding; a moment of fewer tokens than ``in_features`` has many of them. They
    are set to the bound, so that solutions are mostly in their directions, as with exact sums.

    Args:
        matrix: :math:`C`.
        precision: Dtype in which the sums were computed and stored.

    Raises:
        UserError: The matrix is not finite or zero.
    """

    def __init__(self, matrix: Tensor, precision: torch.dtype = torch.float64) -> None:
        if not torch.isfinite(matrix).all() or not matrix.diagonal().sum() > 0:
            raise UserError("the second moment of the keys is not finite; check the model and the statistics corpus")
        self.matrix = matrix.double()
        self._cholesky, failed = torch.linalg.cholesky_ex(self.matrix)
        self._eigen: tuple[Tensor, Tensor] | None = None
        eps, diagonal = torch.finfo(precision).eps, self.matrix.diagonal()
        # The factorisation succeeds unless rounding makes an eigenvalue negative. Then small squared pivots, the part
        # of a coordinate that earlier ones do not explain, reveal small eigenvalues.
        rounding = (self._cholesky.diagonal().square() <= 8 * eps * diagonal).any()
        if failed.item() or rounding.item():
            values, vectors = torch.linalg.eigh(self.matrix)
            of_solver = values.max() * torch.finfo(torch.float64).eps * len(values)
            floor = torch.maximum(eps * diagonal.sum(), of_solver)
            rank_zero_warn(
                f"the second moment is not positive definite ({int((values <= floor).sum())} of {len(values)} "
                "eigenvalues vanish); solving by eigenvalues. More statistics tokens, or a `ridge`, would help"
            )
            self._eigen = values.clamp_min(floor), vectors

    def to(self, device: torch.device) -> SecondMoment:
        """Move to a device, in place."""
        self.matrix, self._cholesky, self._eigen = to_device((self.matrix, self._cholesky, self._eigen), device)
        return self

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues, ascending, and eigenvectors, which are not cached."""
        return torch.linalg.eigh(self.matrix)

    def inverse(self) -> Tensor:
        r"""Return :math:`C^{-1}`."""
        return self.solve(torch.eye(len(self.matrix)).to(self.matrix))

    def solve(self, keys: Tensor) -> Tensor:
        r"""Return :math:`C^{-1} K` for keys ``(in_features, n)``."""
        if self._eigen is not None:
            values, vectors = self._eigen
            return vectors @ ((vectors.T @ keys) / values[:, None])
        # `torch.cholesky_solve` would copy the factor, which takes ten times as long as solving for a few keys.
        half = torch.linalg.solve_triangular(self._cholesky, keys, upper=False)
        return torch.linalg.solve_triangular(self._cholesky.T, half, upper=True)
