"""Replays steps on a model: all of them, some of them, or temporarily none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prune_lightning.errors import UserError
from prune_lightning.ledger.record import FinishRecord, StepRecord
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.edited_part import EditedPart, Event
from prune_lightning.types import Update

Restrain = Callable[[Any], None]
"""Restrains one matrix."""


def replay(
    module: EditingModule,
    records: Iterable[StepRecord | FinishRecord],
    restrain: Restrain | None = None,
    memory: bool = True,
) -> None:
    """Replay steps: add their updates and subtract or withhold the restraint's corrections.

    Args:
        module: In the state before the first of these steps; prepared, unless ``memory`` is false.
        records: Consecutive steps.
        restrain: Restrains one matrix; needed where a correction was too large to store.
        memory: Restore the method's memory, too; only needed for further edits.

    Raises:
        UserError: ``restrain`` is needed.
    """
    parts = module.run.parts
    unknown: set[str] = set()  # matrices whose withheld part was not stored
    written = False
    for record in records:
        if isinstance(record, StepRecord):
            module.run.move_to(record.num_requests, record.step)
        if isinstance(record, StepRecord) and record.from_base:
            continue
        written = True
        for name, events in record.events.items():
            _replay_part(parts[name], events, unknown, restrain)
        if memory and isinstance(record, StepRecord) and record.applied:
            module.remember(record.observed)
    if not written:
        return
    for name, part in parts.items():
        if name in unknown:
            _needed(restrain)(part)
        part.write()
        part.begin_step()


def _replay_part(part: EditedPart, events: Sequence[Event], unknown: set[str], restrain: Restrain | None) -> None:
    """Replay one part; what is withheld of a matrix is recomputed only where something depends on it."""
    withheld = [event for event in events if event.kind == "withhold"]
    if part.name in unknown and events:
        unknown.discard(part.name)
        if not withheld:  # the steps that follow keep withholding it
            _needed(restrain)(part)
    part.replay(events)
    if withheld and withheld[-1].recomputed:
        unknown.add(part.name)
    if any(event.recomputed and event.kind == "subtract" for event in events):
        _needed(restrain)(part)


def _needed(restrain: Restrain | None) -> Restrain:
    if restrain is None:
        raise UserError("the run's restraint has to recompute its corrections: pass restrain=")
    return restrain


def without(
    module: EditingModule,
    records: Iterable[StepRecord],
    taken_back: Collection[int],
    after_step: Callable[[], Any] | None = None,
    memory: bool = True,
) -> list[StepRecord]:
    """Replay a stream without some of its steps. The other updates are added as they were computed.

    The corrections of a restraint depend on all earlier updates, so they are not replayed: ``after_step`` restrains
    again. The updates are not recomputed, although they were computed with the removed steps in place.

    Args:
        module: On its unedited model, prepared.
        records: All steps of its stream, in order.
        taken_back: Numbers of the steps to leave out.
        after_step: Called after each counted step, to restrain as in the run.
        memory: See :func:`replay`.

    Returns:
        The steps that were left out.

    Raises:
        UserError: What is edited does not allow it.
    """
    if taken_back and (reason := next((p.inseparable for p in module.run.parts.values() if p.inseparable), None)):
        raise UserError(f"single edits cannot be taken back: {reason}")
    left_out = []
    for record in records:
        if record.step in taken_back:
            left_out.append(record)
            continue
        for part in module.run.parts.values():
            part.begin_step()
        for name, changes in _updates(record).items():
            for change in changes:
                module.run.parts[name].add(change)
        if memory and record.applied:
            module.remember(record.observed)
        module.run.move_to(module.run.num_requests + len(record.requests), module.run.num_steps + 1)
        if after_step and record.applied:
            after_step()
    return left_out


def _updates(record: StepRecord) -> Mapping[str, list[Update]]:
    return {
        name: [event.change for event in events if event.kind == "add" and event.change is not None]
        for name, events in record.events.items()
    }


@contextmanager
def base_model(module: EditingModule) -> Iterator[None]:
    """Restore the unedited model inside the block, then the edited one bit for bit."""
    with module.unedited():
        yield
