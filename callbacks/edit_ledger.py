"""Writes the ledger of an edit stream and resumes from one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from prune_lightning.distributed import fail_together, on_rank_zero
from prune_lightning.errors import UserError
from prune_lightning.ledger import FinishRecord, Ledger, Rebuilt, StepRecord, check_base, rebuild
from prune_lightning.ledger.sketch import StateSketch
from prune_lightning.ledger.snapshots import HeldState, SnapshotCadence
from prune_lightning.methods.base import EditingModule
from prune_lightning.spectral import RestrainedMatrix
from prune_lightning.types import EditBatch

from ._editing import KeepsEndState, editing_module, keepers, last_report
from ._lightning import LightningCallback
from ._order import Place, check_order
from ._timing import part_of_phase
from .restraint import Restraint

_SETTINGS = ("method_options", "restraint_options", "seed")
_log = logging.getLogger(__name__)


class EditLedger(LightningCallback):
    """Writes every step into the ledger after all other callbacks have processed it; list it last.

    Each step is written when it is complete: its update, the corrections of restraints, and the method's memory of it.
    That happens in the background, while the next step is computed. Snapshots of the whole state are written with steps
    whose state the stored updates do not restore bit for bit, now and then otherwise, and at the end.

    With the ``ledger`` of an earlier run, the run continues after its last complete step. The state is restored once
    the module is prepared, and the stream has to begin after that step (``EditStream(done=ledger.sizes)``).

    Args:
        folder: Folder of the ledger.
        base: Description of the base besides the fingerprints: name, revision, method, seed, and so on.
        ledger: The ledger to resume.
        snapshot_every: Steps between two snapshots; ``None`` to decide by what a resume needs and by time, see
            :class:`~prune_lightning.ledger.snapshots.SnapshotCadence`.
        snapshot_share: Largest share of the run's time that snapshots may take.

    Attributes:
        rebuilt: How the state of a resumed run was restored.
    """

    place: ClassVar[Place] = Place.LEDGER

    def __init__(
        self,
        folder: str | Path,
        base: Mapping[str, Any] | None = None,
        ledger: Ledger | None = None,
        snapshot_every: int | None = None,
        snapshot_share: float = 0.01,
    ) -> None:
        self.folder, self.base = Path(folder), dict(base or {})
        self.ledger = ledger
        self.rebuilt: Rebuilt | None = None
        self._to_resume = ledger is not None
        self._cadence = SnapshotCadence(snapshot_every, snapshot_share)
        self._sketch: StateSketch | None = None
        self._exact = True  # since the latest snapshot, the steps restore the change bit for bit

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the order of callbacks and the settings, and count the earlier steps as done."""
        module = editing_module(self, pl_module)
        check_order(trainer)
        if self.ledger is not None:
            self._check_settings(self.ledger)
            module.load_constants(self.ledger.base.get("constants", {}))
            progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.total.ready = progress.total.completed = len(self.ledger.lines)

    def _check_settings(self, ledger: Ledger) -> None:
        for name in _SETTINGS:
            if name in self.base and name in ledger.base and self.base[name] != ledger.base[name]:
                difference = _difference(name, ledger.base[name], self.base[name])
                raise UserError(f"the run to resume had other settings: {difference}")

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the ledger, or restore the state of the run to resume. By now the module is prepared."""
        module = editing_module(self, pl_module)
        self._sketch = StateSketch(module.edited_matrices())
        if self._to_resume:
            self._to_resume = False
            with module.clock.phase("resume"):
                self._resume(trainer, module)
        elif self.ledger is None:
            self._create(trainer, module)

    def _create(self, trainer: L.Trainer, module: EditingModule) -> None:
        about = {
            **self.base,
            "device": module.device.type,
            "restraints": [type(restraint).__name__ for restraint in _restraints(trainer)],
            "originals": module.originals(),
            "constants": dict(module.constants()),
        }

        def create() -> None:
            self.ledger = Ledger.create(self.folder, about)

        on_rank_zero(create)

    def _resume(self, trainer: L.Trainer, module: EditingModule) -> None:
        assert self.ledger is not None
        restraints = _restraints(trainer)

        def restrain(matrix: RestrainedMatrix) -> None:
            next(each for each in reversed(restraints) if matrix.name in each.matrices).restrain(matrix)

        with fail_together():  # every process reads it before it is truncated
            check_base(self.ledger, module)
            self.rebuilt = rebuild(module, self.ledger, restrain=restrain if restraints else None, finished=False)
        self._exact = self.rebuilt.exact
        _log.info("%s", self.rebuilt)
        end = {} if self.ledger.finish_line is None else self.ledger.finish_line["callbacks"]
        on_rank_zero(self.ledger.cut)
        lines = self.ledger.lines
        for name, callback in keepers(trainer).items():
            callback.load_step_states([line["callbacks"][name] for line in lines if name in line["callbacks"]])
            if isinstance(callback, KeepsEndState):
                callback.load_end_state(end.get(name, {}), lines[-2]["num_requests"] if len(lines) > 1 else 0)

    @override
    @part_of_phase("ledger")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Write the step, and a snapshot if one is due."""
        module = editing_module(self, pl_module)
        record = self._record(trainer, module, batch)
        snapshot = on_rank_zero(partial(self._is_due, trainer, module, record))
        state = module.run.state_dict() if snapshot else None
        on_rank_zero(partial(self._append, record, state))

    def _record(self, trainer: L.Trainer, module: EditingModule, batch: EditBatch) -> StepRecord:
        """Return what is to be written of a step; on every process, since sharded weights are read by all together."""
        assert self._sketch is not None
        report, observed = last_report(module), module.run.settle()
        states = {name: callback.step_state() for name, callback in keepers(trainer).items()}
        return StepRecord(
            step=module.run.num_steps,
            num_requests=module.run.num_requests,
            requests=[request.as_dict() for request in batch.requests],
            applied=report.applied,
            from_base=batch.from_base,
            callbacks={name: state for name, state in states.items() if state},
            events=module.run.take_events(),
            observed=observed,
            sketch={} if batch.from_base else self._sketch.take(),
        )

    def _is_due(self, trainer: L.Trainer, module: EditingModule, record: StepRecord) -> bool:
        """Whether a snapshot is to be written with a step."""
        assert self.ledger is not None
        self._exact &= all(event.exact for each in record.events.values() for event in each)
        with self._cadence.waiting():
            self.ledger.wait()
        parts = module.run.parts.values()
        exact = self._exact and all(part.exact for part in parts)
        size = sum(part.num_bytes for part in parts)
        due = self._cadence.due(module.run.num_steps, self.ledger.snapshots.expected_seconds(size), exact)
        # A run that continues after this step needs the state from before the end of the stream changes it.
        ends = module.run.pending and (trainer.is_last_batch or trainer.should_stop)
        return not record.from_base and (ends or due)

    def _append(self, record: StepRecord, state: Mapping[str, Any] | None) -> None:
        assert self.ledger is not None
        with self._cadence.waiting():
            self.ledger.append(record, None if state is None else HeldState.of(state))
        if state is not None:
            self._cadence.taken()
            self._exact = True

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let the latest step be written."""
        if self.ledger is not None:
            try:
                self.ledger.wait()
            except UserError as error:  # what ended the run is reported already
                rank_zero_warn(str(error))

    @override
    @part_of_phase("ledger")
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the events of the end of the stream and the final state."""
        module = editing_module(self, pl_module)
        module.run.finish()
        states = {name: callback.step_state() for name, callback in keepers(trainer).items()}
        if module.run.num_steps:
            assert self._sketch is not None
            record = FinishRecord(
                step=module.run.num_steps,
                callbacks={name: state for name, state in states.items() if state},
                events=module.run.take_events(),
                sketch=self._sketch.take(),
            )
            on_rank_zero(partial(self._finish, record, module.run.state_dict()))

    def _finish(self, record: FinishRecord, state: Mapping[str, Any]) -> None:
        assert self.ledger is not None
        self.ledger.wait()
        if not any(line["from_base"] for line in self.ledger.lines[-1:]):  # otherwise no edited model is left
            self.ledger.append_finish(record, HeldState.of(state, final=True))


def _restraints(trainer: L.Trainer) -> list[Restraint]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Restraint)]  # type: ignore[attr-defined]


def _difference(name: str, earlier: Any, now: Any) -> str:
    """Describe which part of a nested setting differs."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted({*earlier, *now}, key=str):
            if earlier.get(key) != now.get(key):
                return _difference(f"{name}.{key}", earlier.get(key), now.get(key))
    return f"{name.replace('_options', '')} was {earlier!r} and is {now!r} now"
