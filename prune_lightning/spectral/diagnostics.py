"""Figures of a matrix's spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lightning.spectral.laws import RestraintLaw
from prune_lightning.spectral.triplets import bidiagonalise, fp64

_DENSE_UP_TO = 256


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values in descending order, fp64; all NaN if the matrix is not finite."""
    matrix = fp64(matrix)
    if not torch.isfinite(matrix).all():
        return torch.full((min(matrix.shape),), float("nan"), dtype=torch.float64, device=matrix.device)
    return torch.linalg.svdvals(_core(matrix))


def _core(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular values, square where that is less work.

    LAPACK begins with this step itself, CUDA's Jacobi iteration does not, and would work on all rows in every sweep.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if matrix.device.type == "cpu" or tall.shape[0] < 2 * tall.shape[1]:
        return matrix
    return torch.linalg.qr(tall, mode="r").R


def sigma_max(matrix: Tensor, tolerance: float = 1e-6) -> float:
    """Return the largest singular value; NaN if the matrix is not finite.

    For large matrices, block Lanczos needs a few dozen products with the matrix instead of a full decomposition.

    Args:
        matrix: Any shape and floating dtype.
        tolerance: Relative residual at which Lanczos stops; the error of the value is of second order in it.

    >>> sigma_max(torch.diag(torch.tensor([3.0, 1.0])))
    3.0
    """
    if min(matrix.shape) > _DENSE_UP_TO and torch.isfinite(matrix).all():
        tall = fp64(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T)
        found = bidiagonalise(tall, lambda sigma, residual: bool(residual[0] <= tolerance * sigma[0]))
        if found is not None:
            return float(found[1][0])
    return float(singular_values(matrix)[0])


def condition_number(matrix: Tensor) -> float:
    r"""Return :math:`\kappa = \sigma_{\max}/\sigma_{\min}` over the ``min(m, n)`` singular values.

    >>> condition_number(torch.diag(torch.tensor([3.0, 1.0])))
    3.0
    """
    sigma = singular_values(matrix)
    return float(sigma[0] / sigma[-1])


def stable_rank(sigma: Tensor) -> float:
    r"""Return :math:`\|M\|_F^2 / \sigma_1^2`, at most the rank; zero for the zero matrix.

    Args:
        sigma: Singular values, descending.

    >>> stable_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    return float((sigma / sigma[0]).square().sum()) if sigma[0] != 0 else 0.0


def effective_rank(sigma: Tensor) -> float:
    r"""Return :math:`\exp(-\sum_i p_i \log p_i)` with :math:`p_i = \sigma_i/\sum_j\sigma_j` (Roy & Vetterli, 2007).

    Args:
        sigma: Singular values; zero for the zero matrix.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    total = sigma.sum()
    return float(torch.special.entr(sigma / total).sum().exp()) if total != 0 else 0.0


def perturbation_bound(law: RestraintLaw, sigma_delta: float, reference: float) -> float:
    r"""Return Weyl's bound on the restrained matrix, :math:`\sigma_{\max}(W_r) \le \bar s + F(\sigma_1(\Delta))`.

    Args:
        law: The law :math:`F`.
        sigma_delta: :math:`\sigma_1(\Delta)`, the largest singular value of the change.
        reference: :math:`\bar s`, the largest singular value of the original matrix.

    >>> from prune_lightning.spectral.laws import HardClip
    >>> perturbation_bound(HardClip(), sigma_delta=50.0, reference=4.0)
    8.0
    """
    if sigma_delta <= reference:
        return reference + sigma_delta
    return reference + float(law(torch.tensor([sigma_delta], dtype=torch.float64), reference))
