"""Keeps the ledger of an edit stream, and goes on with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
from typing_extensions import override

from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger, StepRecord, check_base, replay
from prune_lightning.ledger.replay import originals, weights_fingerprint
from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch

from ._measuring import part_of_phase
from .restraint import Restraint


@runtime_checkable
class SpeaksOfSteps(Protocol):
    """A callback that has something to say of each step, with which it can go on in a resumed run."""

    def step(self) -> Mapping[str, Any]:
        """Return what it has to say of what happened since it was asked last, JSON-able; empty for nothing."""
        ...

    def take_up(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what it said of earlier steps, in order."""
        ...


class EditLedger(L.Callback):
    """Writes every step into the ledger once everything else about it is done; list it last.

    With a ``ledger`` that is there already, the run goes on after its last complete step: the steps are put back bit
    for bit when the module is prepared, and the stream begins behind them (see ``EditStream.skip``).

    Args:
        folder: Where the ledger lies.
        base: What is known of the base besides the fingerprints: name, revision, method, seed, and so on.
        ledger: The ledger to go on with.
    """

    def __init__(self, folder: str | Path, base: Mapping[str, Any] | None = None, ledger: Ledger | None = None) -> None:
        self.folder, self.base = Path(folder), dict(base or {})
        self.ledger = ledger
        self._resumed = ledger is not None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the module put the earlier steps back once it is prepared, and count them as steps made."""
        if not isinstance(pl_module, EditingModule):
            raise UserError(f"EditLedger keeps the ledger of editing modules, but got {type(pl_module).__name__}")
        if self._resumed:
            pl_module.go_on = lambda: self._put_back(pl_module)
            progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            assert self.ledger is not None
            progress.total.ready = progress.total.completed = len(self.ledger.lines)

    def _put_back(self, module: EditingModule) -> None:
        assert self.ledger is not None
        check_base(self.ledger, module)
        restraints = _restraints(module.trainer)
        replay(module, self.ledger.records(module.device), restraints[-1].restrain if restraints else None)
        module.trainer.strategy.barrier("ledger")  # everybody has read it
        if module.trainer.is_global_zero:
            self.ledger.cut()
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SpeaksOfSteps):
                name = type(callback).__name__
                callback.take_up([line["callbacks"][name] for line in self.ledger.lines if name in line["callbacks"]])
        self._resumed = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the ledger."""
        assert isinstance(pl_module, EditingModule)
        if self.ledger is None and trainer.is_global_zero:
            about = {
                **self.base,
                "device": pl_module.device.type,
                "restraints": [type(restraint).__name__ for restraint in _restraints(trainer)],
                "originals": originals(pl_module),
            }
            self.ledger = Ledger.create(self.folder, about)

    @override
    @part_of_phase("ledger")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Write the step."""
        assert isinstance(pl_module, EditingModule)
        report = pl_module.last_report
        assert report is not None
        said = {type(c).__name__: c.step() for c in trainer.callbacks if isinstance(c, SpeaksOfSteps)}  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            assert self.ledger is not None
            self.ledger.append(
                StepRecord(
                    step=pl_module.num_steps,
                    num_edits=pl_module.num_edits,
                    requests=[request.as_dict() for request in batch.requests],
                    applied=report.applied,
                    from_base=batch.from_base,
                    callbacks={name: words for name, words in said.items() if words},
                    events={name: matrix.journal for name, matrix in pl_module.edited_matrices().items()},
                    observed=pl_module.observed,
                    weights=weights_fingerprint(pl_module),
                )
            )


def _restraints(trainer: L.Trainer) -> list[Restraint]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Restraint)]  # type: ignore[attr-defined]
