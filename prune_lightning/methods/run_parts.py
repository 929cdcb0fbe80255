"""What an edit run needs of the method and of restraints, and what it keeps to undo a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prune_lightning.types import EditRequest


class MethodMemory(Protocol):
    """What an editing method remembers of its edits; see :class:`~.base.EditingModule`."""

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return what must be remembered of requests that have been written."""
        ...

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Add what :meth:`observe` returned."""
        ...

    def memory(self) -> Mapping[str, Tensor]:
        """Return everything that has been remembered."""
        ...

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Replace what has been remembered."""
        ...

    def forget(self) -> None:
        """Drop everything that has been remembered."""
        ...


class AttachedRestraint(Protocol):
    """What a run needs of a restraint that holds its matrices."""

    pending: bool

    def restore_pending(self, pending: bool) -> None:
        """Set whether something is pending, when a step is undone."""
        ...

    def evaluation_view(self) -> AbstractContextManager[None]:
        """Show, inside the block, the model as it would be if the run ended now."""
        ...

    def finish(self) -> None:
        """Restrain what is pending, for good."""
        ...


@dataclass(frozen=True)
class StepBackup:
    """What a step is going to change, to undo it: the matrices, and what was pending."""

    matrices: Mapping[str, Mapping[str, Tensor]]
    pending: Sequence[bool]
