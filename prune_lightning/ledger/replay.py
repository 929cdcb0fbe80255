"""Steps put back into a model: all of them, some of them, or none for a while."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from prune_lightning.errors import UserError
from prune_lightning.fingerprint import fingerprint, sampled_fingerprint
from prune_lightning.ledger.record import StepRecord
from prune_lightning.ledger.store import Ledger
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.types import MatrixUpdate

Restrain = Callable[[EditedMatrix], None]


def originals(module: EditingModule) -> dict[str, str]:
    """Return the fingerprints of the unedited matrices, by the name of their weight."""
    return {name: fingerprint(matrix.original()) for name, matrix in module.edited_matrices().items()}


def check_base(ledger: Ledger, module: EditingModule) -> None:
    """Refuse a module whose unedited matrices are not the ones that the ledger's steps belong to.

    Raises:
        UserError: They differ.
    """
    recorded, found = ledger.base["originals"], originals(module)
    for name in sorted({*recorded, *found}):
        if recorded.get(name) != found.get(name):
            raise UserError(
                f"the ledger in {ledger.folder} belongs to another base: {name} is "
                f"{found.get(name, 'not edited')} here and {recorded.get(name, 'not edited')} there"
            )


def weights_fingerprint(module: EditingModule) -> str:
    """Return a cheap fingerprint of the edited weights as they are."""
    return sampled_fingerprint({name: matrix.weight() for name, matrix in module.edited_matrices().items()})


def replay(
    module: EditingModule, records: Iterable[StepRecord], restrain: Restrain | None = None, memory: bool = True
) -> None:
    """Bring a module to where it was after these steps, bit for bit: weights, change, and what the method remembers.

    Args:
        module: On its unedited model; prepared, unless it is not to remember anything.
        records: The first steps of its stream, in order.
        restrain: Restrains one matrix; needed where the run's restraint took away more than was worth keeping.
        memory: Have the method remember what it did; only needed to edit further.

    Raises:
        UserError: ``restrain`` is needed, or the weights come out otherwise than they were.
    """
    matrices = module.edited_matrices()
    withheld_anew: set[str] = set()  # what is withheld from these is not known yet
    last: StepRecord | None = None
    for record in records:
        for name, events in () if record.from_base else record.events.items():
            withheld = [event for event in events if event.kind == "withhold"]
            if name in withheld_anew and events:
                withheld_anew.discard(name)
                if not withheld:  # the steps that follow keep withholding it
                    _needed(restrain)(matrices[name])
            matrices[name].replay(events)
            if withheld and withheld[-1].recomputed:
                withheld_anew.add(name)
            if any(event.recomputed and event.kind == "subtract" for event in events):
                _needed(restrain)(matrices[name])
        if memory and record.applied and not record.from_base:
            module.remember(record.observed)
        module.num_edits, module.num_steps = record.num_edits, record.step
        last = record
    if last is None or last.from_base:
        return
    for name, matrix in matrices.items():
        if name in withheld_anew:
            _needed(restrain)(matrix)
        matrix.write()
        matrix.begin_step()
    if last.weights not in (None, weights_fingerprint(module)):
        raise UserError(
            f"the weights after edit {last.num_edits} come out otherwise than they were: another device, another "
            "version of the libraries, or other settings of the restraint"
        )


def _needed(restrain: Restrain | None) -> Restrain:
    if restrain is None:
        raise UserError("the run was restrained, and most of what was taken away has to be computed again: restrain=")
    return restrain


def without(
    module: EditingModule,
    records: Iterable[StepRecord],
    taken_back: Collection[int],
    after_step: Callable[[], Any] | None = None,
    memory: bool = True,
) -> list[StepRecord]:
    """Replay a stream as if some steps had never been: the others' updates as they were computed, one after another.

    What a restraint takes away depends on all updates so far, so its old corrections are not replayed:
    ``after_step`` restrains anew. Updates are those that were computed when the steps taken back were still there.

    Args:
        module: On its unedited model, prepared.
        records: All steps of its stream, in order.
        taken_back: Numbers of the steps to leave out.
        after_step: Called after each step, when it is counted: restrains as the run's restraint did.
        memory: Have the method remember what the others did; see :func:`replay`.

    Returns:
        The steps that were left out.
    """
    left_out = []
    for record in records:
        if record.step in taken_back:
            left_out.append(record)
            continue
        updates = _updates(record)
        for matrix in module.edited_matrices().values():
            matrix.begin_step()
        for name, changes in updates.items():
            for change in changes:
                module.edited_matrices()[name].add(change)
        if memory and record.applied:
            module.remember(record.observed)
        module.num_edits += len(record.requests)
        module.num_steps += 1
        if after_step and record.applied:
            after_step()
    return left_out


def _updates(record: StepRecord) -> Mapping[str, list[MatrixUpdate]]:
    return {
        name: [event.change for event in events if event.kind == "add" and event.change is not None]
        for name, events in record.events.items()
    }


@contextmanager
def base_model(module: EditingModule) -> Iterator[None]:
    """Run the unedited model inside the block; every bit of the edited one is put back."""
    matrices = list(module.edited_matrices().values())
    edited = [matrix.parameter.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.weight().copy_(matrix.original())
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, weight in zip(matrices, edited, strict=True):
                matrix.parameter.copy_(weight)
