"""RECT: RElative Change in weighT (Gu et al., EMNLP 2024, https://arxiv.org/abs/2401.04700)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from prune_lightning.costs import Changes, RestraintCost, plain_restraint
from prune_lightning.errors import UserError
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.ranges import KeptShare
from prune_lightning.spectral import RestrainedMatrix
from prune_lightning.value_types import check_value

from ._adapted import AdaptedMatrix
from ._snapshot import SnapshotMatrix
from .restraint import Restraint


class RECT(Restraint):
    r"""Of each step's change, keep only the entries with the largest relative change.

    .. math:: \rho_{ij} = |\Delta_{ij} / W_{ij}|

    with :math:`\Delta` the change of this step and :math:`W` the weight before it; the share ``keep`` with the largest
    :math:`\rho` is kept and the rest of the step is set to zero. Where the weight is zero, any change counts as
    infinite. The masked change is not of low rank, so PRUNE, listed after RECT, takes the dense path.

    Args:
        keep: Share of the entries to keep, in (0, 1]. Published: 0.2 (RECT's code), 0.4 (AlphaEdit's comparison).
        parameters: See :class:`Restraint`.
        feedback: Withhold what is set to zero in place of subtracting it: the next step is its update plus what is
            withheld, and the share of that with the largest relative change is kept. See :class:`Restraint`.

    Raises:
        UserError: A share outside (0, 1].
    """

    def __init__(
        self, keep: KeptShare = 0.2, parameters: str | Sequence[str] | None = None, feedback: bool = False
    ) -> None:
        super().__init__(parameters, feedback=feedback)
        check_value("restraint.keep", keep, KeptShare)
        self.keep = keep
        self._kept_shares: dict[str, float] = {}

    @property
    @override
    def low_rank(self) -> bool:
        """Only if every entry is kept."""
        return self.keep == 1

    @override
    def attach(self, module: nn.Module, steps: int = 0, others: Sequence[Restraint] = ()) -> None:
        """Attach to the matrices and track their changes step by step."""
        if others:
            raise UserError("RECT has to process a step before any other restraint: list it first")
        super().attach(module, steps, others)
        self._kept_shares = {}
        for matrix in self.matrices.values():
            if isinstance(matrix, SnapshotMatrix):
                matrix.follow_steps()
            elif isinstance(matrix, AdaptedMatrix):
                matrix.step()  # which says what to do

    @override
    def restrain(self, matrix: RestrainedMatrix) -> None:
        """Set the entries of the step with the smaller relative change to zero."""
        update = matrix.step()
        before = matrix.original().to(update) + matrix.delta() - update
        step = matrix.step_with_withheld() if self.feedback and isinstance(matrix, EditedMatrix) else update
        kept = largest_relative_change(step, before, self.keep)
        norms = [torch.linalg.matrix_norm(part) for part in (step.where(kept, 0.0), step)]
        kept_norm, norm = torch.stack(norms).tolist()  # one wait for the device
        self._kept_shares[matrix.name] = kept_norm / norm if norm else 1.0
        if self.feedback and isinstance(matrix, EditedMatrix):
            matrix.drop(~kept)
        else:
            matrix.subtract(step.masked_fill(kept, 0.0))

    @override
    def cost(self, changes: Changes) -> RestraintCost:
        """Return the cost of five dense copies of one matrix, and of ten passes over each."""
        return plain_restraint(changes, copies=5, passes=10)

    @override
    def figures(self) -> dict[str, float]:
        """Return the smallest kept share of a step's norm."""
        return {"kept_norm": min(self._kept_shares.values(), default=1.0)}


def largest_relative_change(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    r"""Return the mask of the entries with the largest :math:`|\Delta_{ij}/W_{ij}|`.

    Args:
        change: :math:`\Delta`.
        weight: :math:`W`, same shape.
        keep: Share of the entries; the number is :math:`mn - \lfloor(1-\text{keep})\,mn\rfloor`, exactly: ties are
            resolved by index, the first ones stay.

    >>> largest_relative_change(torch.tensor([[1.0, -2.0, 3.0, 0.0]]), torch.ones(1, 4), keep=0.5)
    tensor([[False,  True,  True, False]])
    """
    relative = (change / weight).abs().flatten()
    relative = torch.where(relative.isnan(), -torch.inf, relative)
    size = relative.numel()
    count = size - math.floor(round((1 - keep) * size, 6))
    threshold = torch.kthvalue(relative, size - count + 1).values
    mask, ties = relative > threshold, relative == threshold
    mask |= ties & (ties.cumsum(0, dtype=torch.int32) <= count - mask.sum())
    return mask.view_as(change)
