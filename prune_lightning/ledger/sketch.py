r"""A few numbers per matrix that distinguish rounding from a real difference when a state is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.devices import rows_at_a_time
from prune_lightning.methods.edited_matrix import EditedMatrix

_SIDE = 4  # random vectors on each side: 16 products estimate a norm to about a fifth


@dataclass(frozen=True)
class MatrixSketch:
    r"""The sketch of one matrix after a step.

    Args:
        products: :math:`S^\top (W - W_0)\, T` with random signs :math:`S, T`, row by row. Their mean square over the
            16 entries estimates :math:`\|W - W_0\|_F^2`, and that of a difference the square norm of the difference.
        change_norm: :math:`\|\Delta\|_F`, the norm of the sum of all updates.
    """

    products: tuple[float, ...]
    change_norm: float


class StateSketch:
    """Sketches edited matrices; equal shapes get equal random signs in every process.

    Args:
        matrices: The matrices under edit.
    """

    def __init__(self, matrices: Mapping[str, EditedMatrix]) -> None:
        self.matrices = matrices
        self._signs: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def take(self) -> dict[str, MatrixSketch]:
        """Return the present sketch of every matrix."""
        return {name: self._of(matrix) for name, matrix in self.matrices.items()}

    def _of(self, matrix: EditedMatrix) -> MatrixSketch:
        change, (left, right) = matrix.change.master, self._signs_for(matrix)
        # In 16-bit weights rounding can exceed the change, so the change before the cast is used.
        minuend, subtrahend = change, None
        if matrix.parameter.dtype == change.dtype:
            minuend, subtrahend = matrix.weight(), matrix.original()
        elif matrix.withheld is not None:
            minuend = matrix.delta()
        if turned := not change.is_contiguous():
            change, minuend, left, right = change.T, minuend.T, right, left
            subtrahend = None if subtrahend is None else subtrahend.T
        products = torch.zeros(_SIDE, _SIDE, dtype=torch.float64, device=change.device)
        square = products.new_zeros(())
        size = rows_at_a_time(change)
        for first in range(0, len(change), size):
            rows = slice(first, first + size)
            delta = minuend[rows] if subtrahend is None else minuend[rows] - subtrahend[rows]
            products += left[rows].double().T @ (delta @ right).double()
            square += torch.linalg.vector_norm(change[rows]).double() ** 2
        products = products.T if turned else products
        *entries, norm = torch.cat([products.flatten(), square.sqrt()[None]]).tolist()  # one wait for the device
        return MatrixSketch(tuple(entries), norm)

    def _signs_for(self, matrix: EditedMatrix) -> tuple[Tensor, Tensor]:
        key = matrix.name, matrix.parameter.device
        if key not in self._signs:
            rows, columns = matrix.change.master.shape
            generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
            signs = torch.randint(0, 2, (rows + columns, _SIDE), generator=generator).mul_(2).sub_(1)
            left, right = signs.to(matrix.change.master).split([rows, columns])
            self._signs[key] = left, right
        return self._signs[key]


def difference(found: MatrixSketch, recorded: MatrixSketch) -> float:
    r"""Return an estimate of :math:`\|W - W'\|_F` relative to the norm of the change, at least one of them not zero."""
    ours, theirs = torch.tensor(found.products).double(), torch.tensor(recorded.products).double()
    scale = max(found.change_norm, recorded.change_norm)
    norm = float((ours - theirs).square().mean().sqrt())
    if not torch.isfinite(ours - theirs).all():
        return float("inf")
    return norm / scale if scale else float(norm > 0)


def tolerance(matrix: EditedMatrix) -> float:
    r"""Return the largest relative difference that counts as rounding: the square root of the precision.

    A rebuilt state differs by :math:`\epsilon` times the condition of the computation, and by more where large updates
    cancel. Half of the digits are a margin for that. Other settings, or another base, differ by far more.
    """
    return float(torch.finfo(matrix.change.master.dtype).eps) ** 0.5
