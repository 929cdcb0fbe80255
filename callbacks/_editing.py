"""Shared by the callbacks of edit streams: the module they need and the state they keep per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L

from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditReport


@runtime_checkable
class KeepsStepState(Protocol):
    """A callback whose state grows with every step. The ledger stores it, so that a resumed run restores it."""

    def step_state(self) -> Mapping[str, Any]:
        """Return what was added since the last call, as JSON-serializable values; empty if nothing was."""
        ...

    def load_step_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state from the values of :meth:`step_state` of an earlier run, one per step, in order."""
        ...


@runtime_checkable
class KeepsEndState(Protocol):
    """A callback whose work at the end of a stream can be a part of a longer stream, too."""

    def load_end_state(self, state: Mapping[str, Any], before: int) -> None:
        """Restore what was added at the end of a stream that now goes on; the next step is to add it again.

        Args:
            state: The value of ``step_state`` at the end; empty if the stream had not ended.
            before: Requests handled before the last step.
        """
        ...


def editing_module(callback: L.Callback, module: L.LightningModule) -> EditingModule:
    """Return the module if it is an editing module.

    Raises:
        UserError: It does not.
    """
    if not isinstance(module, EditingModule):
        raise UserError(f"{type(callback).__name__} works with editing modules, but got {type(module).__name__}")
    return module


def last_report(module: EditingModule) -> EditReport:
    """Return the report of the latest step."""
    assert module.run.last_report is not None, "there is no step yet"
    return module.run.last_report


def keepers(trainer: L.Trainer) -> dict[str, KeepsStepState]:
    """Return the callbacks that keep a state per step, by a name that stays the same in a resumed run."""
    found: dict[str, KeepsStepState] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, KeepsStepState):
            name = type(callback).__name__
            same = sum(known.partition("#")[0] == name for known in found)
            found[f"{name}#{same + 1}" if same else name] = callback
    return found
