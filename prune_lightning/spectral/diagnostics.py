"""Figures of a matrix's spectrum."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values in descending order, fp64; NaN throughout if the matrix is not finite."""
    matrix = matrix.double()
    if not torch.isfinite(matrix).all():
        return torch.full((min(matrix.shape),), float("nan"), dtype=torch.float64, device=matrix.device)
    return torch.linalg.svdvals(matrix)


def sigma_max(matrix: Tensor) -> float:
    """Return the largest singular value.

    >>> sigma_max(torch.diag(torch.tensor([3.0, 1.0])))
    3.0
    """
    return float(singular_values(matrix)[0])


def condition_number(matrix: Tensor) -> float:
    r"""Return :math:`\kappa = \sigma_{\max}/\sigma_{\min}` over the ``min(m, n)`` singular values.

    >>> condition_number(torch.diag(torch.tensor([3.0, 1.0])))
    3.0
    """
    sigma = singular_values(matrix)
    return float(sigma[0] / sigma[-1])
