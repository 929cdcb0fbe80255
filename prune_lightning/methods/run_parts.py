"""Interfaces of methods and restraints that an edit run uses, and the backup that undoes a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from prune_lightning.types import EditRequest


class MethodMemory(Protocol):
    """An editing method's memory of its edits; see :class:`~.base.EditingModule`."""

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return what to remember of requests that have been written."""
        ...

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Add a value of :meth:`observe`."""
        ...

    def memory(self) -> Mapping[str, Tensor]:
        """Return the whole memory."""
        ...

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Replace the memory."""
        ...

    def forget(self) -> None:
        """Clear the memory."""
        ...


class AttachedRestraint(Protocol):
    """The interface of a restraint that is attached to the run's matrices."""

    pending: bool

    def restore_pending(self, pending: bool) -> None:
        """Restore whether something is pending when a step is undone."""
        ...

    def evaluation_view(self) -> AbstractContextManager[None]:
        """Inside the block the model is as it would be if the run ended now."""
        ...

    def finish(self) -> None:
        """Restrain permanently what is pending."""
        ...


@runtime_checkable
class StepFilter(Protocol):
    """A restraint that acts on every step of a method's own optimizer."""

    def filter_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return what the optimizer is to be given instead of the gradient of a weight's change."""
        ...

    def filter_change(self, name: str, change: Tensor) -> Tensor:
        """Return what the change of a weight is to be after the optimizer's step."""
        ...


@dataclass(frozen=True)
class StepBackup:
    """The state before a step, to undo it: the edited parts, and whether something was pending."""

    parts: Mapping[str, Mapping[str, Tensor]]
    pending: Sequence[bool]
