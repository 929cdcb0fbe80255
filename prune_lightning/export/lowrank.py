"""Minimal-rank factors of a change."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lightning.spectral import FactoredMatrix, triplets_above
from prune_lightning.spectral.triplets import fp64
from prune_lightning.types import LowRankUpdate


def lowest_rank(change: LowRankUpdate | Tensor, rank: int | None = None) -> LowRankUpdate:
    r"""Return :math:`\Delta = (U\sqrt\Sigma)(V\sqrt\Sigma)^\top` without singular values at rounding level.

    For a factored change, both factors are orthonormalised by QR and the small core is decomposed; a dense one is
    decomposed directly. A singular value counts as zero up to :math:`\max(m,n)\,\epsilon\,\|\Delta\|` with the
    :math:`\epsilon` of the change's precision.

    Args:
        change: The change, ``out_features x in_features``.
        rank: Largest number of triplets to keep, for the best approximation of that rank.

    Returns:
        Factors, fp64, possibly without columns.
    """
    if isinstance(change, Tensor):
        norm, epsilon = float(torch.linalg.matrix_norm(fp64(change))), torch.finfo(change.dtype).eps
        found = triplets_above(change, _zero(max(change.shape) * epsilon * norm))
    else:
        rows, columns = len(change.left), len(change.right)
        factored = FactoredMatrix(rows, columns, fp64(change.left[:0]).device)
        factored.append(change)
        found = factored.triplets_above(_zero(max(rows, columns) * torch.finfo(torch.float64).eps * change.norm()))
    root = found.sigma[:rank].sqrt()
    return LowRankUpdate(found.left[:, :rank] * root, found.right[:, :rank] * root)


def _zero(threshold: float) -> float:
    return max(threshold, torch.finfo(torch.float64).tiny)
