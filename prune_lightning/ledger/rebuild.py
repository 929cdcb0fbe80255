"""Restores a state: from a snapshot bit for bit, from the steps after it within rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prune_lightning.errors import UserError
from prune_lightning.ledger.record import FinishRecord, StepRecord
from prune_lightning.ledger.replay import Restrain, replay
from prune_lightning.ledger.sketch import MatrixSketch, StateSketch, difference, tolerance
from prune_lightning.ledger.store import Ledger
from prune_lightning.methods.base import EditingModule


@dataclass(frozen=True)
class Rebuilt:
    """How a state was restored.

    Args:
        num_requests: Number of requests in the state.
        snapshot: Step of the snapshot that it started from; 0 for the unedited model.
        replayed: Number of steps that were replayed from the ledger.
        difference: Estimated norm of the difference to the recorded weights, relative to the norm of the change.
        exact: Whether the weights have the bits that they had, on any processor: no product of a correction was
            computed again.
    """

    num_requests: int
    snapshot: int
    replayed: int = 0
    difference: float = 0.0
    exact: bool = True

    def __str__(self) -> str:
        """Return a description for messages."""
        if self.exact:
            return f"restored after edit {self.num_requests}, bit for bit"
        return f"rebuilt after edit {self.num_requests} within {self.difference:.1g} of the change"


def check_base(ledger: Ledger, module: EditingModule) -> None:
    """Check that what a module edits is what the ledger's edits apply to.

    Raises:
        UserError: They differ.
    """
    recorded, found = ledger.base["originals"], module.originals()
    for name in sorted({*recorded, *found}):
        if recorded.get(name) != found.get(name):
            raise UserError(
                f"the ledger in {ledger.folder} belongs to another base: {name} is "
                f"{found.get(name, 'not edited')} here and {recorded.get(name, 'not edited')} there"
            )


def rebuild(
    module: EditingModule,
    ledger: Ledger,
    last: int | None = None,
    restrain: Restrain | None = None,
    memory: bool = True,
    finished: bool = True,
) -> Rebuilt:
    """Restore a module's state after a step: weights, change, and the method's memory.

    The newest snapshot up to that step is loaded bit for bit. Later steps are replayed from their updates and, where
    stored, their corrections; then the weights are compared with the recorded sketch.

    Args:
        module: On its unedited model; prepared, unless ``memory`` is false.
        ledger: The ledger of its stream.
        last: Number of the step; ``None`` for the last one.
        restrain: See :func:`~.replay.replay`; needed only for corrections after the snapshot.
        memory: See :func:`~.replay.replay`.
        finished: With ``last=None``, include the end of the stream.

    Raises:
        UserError: ``restrain`` is needed, or the weights differ by more than rounding.
    """
    count = len(ledger.lines) if last is None else last
    end = ledger.finish(module.device) if last is None else None
    if not finished and end is not None and any(end.events.values()):
        end = None  # the weights changed at the end; without such events the final state is that of the last step
    found = ledger.snapshots.newest(count, final=end is not None)
    start = 0
    if found is not None:
        snapshot, state = found
        module.run.load_state_dict(state, memory)
        start = snapshot.step
        if snapshot.final:
            return Rebuilt(module.run.num_requests, start)
    steps = list(ledger.steps(module.device, start + 1, count))
    tail: list[StepRecord | FinishRecord] = [*steps, *([end] if end else [])]
    replay(module, tail, restrain, memory)
    if not tail or (steps and steps[-1].from_base):
        return Rebuilt(module.run.num_requests, start)
    events = [event for record in tail for each in record.events.values() for event in each]
    exact = all(event.exact for event in events) and all(part.exact for part in module.run.parts.values())
    return Rebuilt(module.run.num_requests, start, len(tail), compare(module, tail[-1].sketch), exact)


def compare(module: EditingModule, recorded: Mapping[str, MatrixSketch]) -> float:
    """Return the largest relative difference between the weights and the recorded sketch.

    Raises:
        UserError: The difference is larger than rounding.
    """
    found = StateSketch(module.edited_matrices()).take() if recorded else {}
    by_name = {name: difference(found[name], recorded[name]) for name in recorded}
    for name, value in by_name.items():
        if not value <= tolerance(module.edited_matrices()[name]):
            raise UserError(
                f"after edit {module.run.num_requests} {name} differs from what was recorded by {value:.2g} of the "
                "change. Rounding does not explain that: the restraint has other settings, or the ledger is damaged"
            )
    return max(by_name.values(), default=0.0)
