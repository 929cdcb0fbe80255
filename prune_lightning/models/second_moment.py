r"""One layer's second moment of keys, :math:`C = \frac1N \sum_i k_i k_i^\top`, and linear solves with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.devices import to_device
from prune_lightning.errors import UserError, one_of

_REFINEMENTS = 20  # at most; each gains the digits that fp32 has beyond the moment's condition
_REFINED = 1e-10  # relative residual
_ROWS = 2048  # of the matrix that are converted at a time


@dataclass(frozen=True)
class Keep:
    """How second moments, and the inverses that methods make of them, are kept between steps.

    Args:
        on_cpu: In the CPU's memory. They are factorised on the device and solved with on the CPU: keys and solutions
            move.
        dtype: Of the second moments: ``float64``, or ``float32`` for half of the memory; solutions are then refined to
            the precision of fp64. Inverses that grow are always fp64: in fp32 a thousand steps lose all digits but two.

    Raises:
        UserError: Another dtype.
    """

    on_cpu: bool = False
    dtype: str = "float64"

    def __post_init__(self) -> None:
        one_of("model.second_moments.dtype", self.dtype, ("float64", "float32"))

    @property
    def size(self) -> int:
        """Bytes of an entry."""
        return 8 if self.dtype == "float64" else 4

    def device(self, own: torch.device) -> torch.device:
        """Return the device where tensors of the device ``own`` are kept."""
        return torch.device("cpu") if self.on_cpu else own

    def place(self, tensor: Tensor) -> Tensor:
        """Return a tensor where it is kept."""
        return tensor.to(self.device(tensor.device))

    def stored(self, moment: Tensor) -> Tensor:
        """Return a second moment, or its factor, where and as it is kept."""
        return self.place(moment.to(getattr(torch, self.dtype)))


class SecondMoment:
    r"""One layer's second moment, symmetric ``(in_features, in_features)``, fp64, factorised for solving.

    Entries that were summed or stored with relative precision :math:`\epsilon` carry errors
    :math:`|E_{ij}| \le \epsilon \sqrt{C_{ii} C_{jj}}`, so that :math:`\|E\|_2 \le \epsilon \operatorname{tr} C`.
    Eigenvalues up to that bound are only rounding; a moment of fewer tokens than ``in_features`` has many of them. They
    are set to the bound, so that solutions are mostly in their directions, as with exact sums.

    Args:
        matrix: :math:`C`.
        precision: Dtype in which the sums were computed and stored.
        keep: How it is kept.

    Raises:
        UserError: The matrix is not finite or zero.
    """

    def __init__(self, matrix: Tensor, precision: torch.dtype = torch.float64, keep: Keep | None = None) -> None:
        if not torch.isfinite(matrix).all() or not matrix.diagonal().sum() > 0:
            raise UserError("the second moment of the keys is not finite; check the model and the statistics corpus")
        self._keep, self._device, exact = keep or Keep(), matrix.device, matrix.double()
        factor, failed = torch.linalg.cholesky_ex(exact)
        self._matrix, self._cholesky = self._keep.stored(exact), self._keep.stored(factor)
        self._eigen: tuple[Tensor, Tensor] | None = None
        eps, diagonal = torch.finfo(precision).eps, exact.diagonal()
        # The factorisation succeeds unless rounding makes an eigenvalue negative. Then small squared pivots, the part
        # of a coordinate that earlier ones do not explain, reveal small eigenvalues.
        rounding = (factor.diagonal().square() <= 8 * eps * diagonal).any()
        if failed.item() or rounding.item():
            values, vectors = torch.linalg.eigh(exact)
            of_solver = values.max() * torch.finfo(torch.float64).eps * len(values)
            floor = torch.maximum(eps * diagonal.sum(), of_solver)
            rank_zero_warn(
                f"the second moment is not positive definite ({int((values <= floor).sum())} of {len(values)} "
                "eigenvalues vanish); solving by eigenvalues. More statistics tokens, or a `ridge`, would help"
            )
            self._eigen = self._keep.place(values.clamp_min(floor)), self._keep.place(vectors)
        elif self._cholesky.dtype != exact.dtype and not self._is_refined(diagonal.sqrt()[:, None]):
            rank_zero_warn("fp32 is not precise enough to solve with the second moment; its factor is kept in fp64")
            self._cholesky = self._keep.place(factor)

    def to(self, device: torch.device) -> SecondMoment:
        """Move to a device, in place; what is kept on the CPU stays there."""
        self._device = device
        if not self._keep.on_cpu:
            held = self._matrix, self._cholesky, self._eigen
            self._matrix, self._cholesky, self._eigen = to_device(held, device)
        return self

    @property
    def matrix(self) -> Tensor:
        """:math:`C`, fp64, on the model's device."""
        return self._matrix.to(self._device, torch.float64)

    def positive(self) -> Tensor:
        """Return :math:`C` as :meth:`solve` takes it: with eigenvalues that are only rounding set to their bound."""
        if self._eigen is None:
            return self.matrix
        values, vectors = (part.to(self._device) for part in self._eigen)
        return (vectors * values) @ vectors.T

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues, ascending, and eigenvectors, which are not cached."""
        return torch.linalg.eigh(self.matrix)

    def inverse(self) -> Tensor:
        r"""Return :math:`C^{-1}`, on the model's device."""
        if self._keep != Keep():
            return SecondMoment(self.matrix).inverse()
        return self.solve(torch.eye(len(self.matrix)).to(self.matrix))

    def solve(self, keys: Tensor) -> Tensor:
        r"""Return :math:`C^{-1} K` for keys ``(in_features, n)``, fp64."""
        here = keys.to(self._matrix.device)
        if self._eigen is not None:
            values, vectors = self._eigen
            return (vectors @ ((vectors.T @ here) / values[:, None])).to(keys)
        solution = self._solve(here)
        if self._cholesky.dtype != here.dtype:
            solution = self._refined(solution, here)
        return solution.to(keys)

    def _solve(self, keys: Tensor) -> Tensor:
        # `torch.cholesky_solve` would copy the factor, which takes ten times as long as solving for a few keys.
        half = torch.linalg.solve_triangular(self._cholesky, keys.to(self._cholesky), upper=False)
        return torch.linalg.solve_triangular(self._cholesky.T, half, upper=True).to(keys)

    def _refined(self, solution: Tensor, keys: Tensor) -> Tensor:
        """Improve a solution until its residual no longer falls (iterative refinement)."""
        smallest = float("inf")
        for _ in range(_REFINEMENTS):
            rest = self._residual(solution, keys)
            size = float(rest.norm())
            if not size < smallest / 2:
                break
            smallest, solution = size, solution + self._solve(rest)
        return solution

    def _residual(self, solution: Tensor, keys: Tensor) -> Tensor:
        parts = [rows.to(keys) @ solution for rows in self._matrix.split(_ROWS)]
        return keys - torch.cat(parts)

    def _is_refined(self, keys: Tensor) -> bool:
        here = keys.to(self._matrix.device)
        rest = self._residual(self._refined(self._solve(here), here), here)
        return bool(rest.norm() <= _REFINED * here.norm())
