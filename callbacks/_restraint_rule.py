"""What each restraint writes for itself."""

from __future__ import annotations

from abc import abstractmethod

from prune_lightning.costs import Changes, RestraintCost, plain_restraint
from prune_lightning.errors import UserError
from prune_lightning.spectral import RestrainedMatrix
from prune_lightning.types import LowRankUpdate


class RestraintRule:
    """The rule of a restraint: only :meth:`restrain` is needed."""

    @abstractmethod
    def restrain(self, matrix: RestrainedMatrix) -> None:
        """Restrain one matrix permanently."""

    def correction(self, matrix: RestrainedMatrix) -> LowRankUpdate | None:
        """Return what :meth:`restrain` would subtract from one matrix now; needed for the ``end`` schedule."""
        raise UserError(f"{type(self).__name__} works step by step and does not support `schedule=end`")

    def figures(self) -> dict[str, float]:
        """Return figures of the latest restraint, by name."""
        return {}

    def before_step(self) -> None:
        """Prepare for a step of an optimizer, with the gradients in place; only some restraints of gradients do."""

    def cost(self, changes: Changes) -> RestraintCost:
        """Return the estimated cost: dense copies of one matrix, unless a subclass overrides it."""
        return plain_restraint(changes)

    @property
    def withholds(self) -> bool:
        """Whether it withholds a part of the change. A matrix withholds one part, so only one restraint of it may."""
        return False

    @property
    def low_rank(self) -> bool:
        """Whether a change of low rank stays one."""
        return True
