"""Writes one JSON line per edit, as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from prune_lightning.atomic_files import append_lines, write_lines
from prune_lightning.distributed import fail_together
from prune_lightning.evaluation.stream import StreamScores, Success, success
from prune_lightning.json_files import nan_to_null
from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch

from ._editing import editing_module, last_report
from ._lightning import LightningCallback
from ._order import Place, check_order


class EditLog(LightningCallback):
    """Logs every request with its success just before and just after the edit, its update's norm, and the seconds.

    List it after the restraint, so that "after" refers to the restrained model.

    Args:
        path: The JSONL file; overwritten. ``None`` for no file.
        stream: Receives the same scores, if given, so that nothing is scored twice.

    Attributes:
        seconds: Sum of the edits' seconds.
        scoring_seconds: Time spent on scoring the requests before and after.
    """

    place: ClassVar[Place] = Place.LOG

    def __init__(self, path: str | Path | None, stream: StreamScores | None = None) -> None:
        self.path, self.stream = None if path is None else Path(path), stream
        self.seconds = 0.0
        self.scoring_seconds = 0.0
        self._before: Success | None = None
        self._lines: list[dict[str, Any]] = []
        self._writes = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the order of callbacks."""
        editing_module(self, pl_module)
        check_order(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the file."""
        self._writes = trainer.is_global_zero
        if self.path and self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not _stream_done(trainer):  # a resumed run keeps the file until its earlier steps are restored
                write_lines(self.path, [])

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the requests before the edit."""
        if not batch.requests:
            return
        module = editing_module(self, pl_module)
        self._before = self._success(module, batch)
        if self.stream:
            cases = range(module.num_requests, module.num_requests + len(batch.requests))
            self.stream.just_before(cases, module.num_requests, self._before)

    def _success(self, module: EditingModule, batch: EditBatch) -> Success:
        start = time.perf_counter()
        with module.clock.part("scores"), module.run.evaluation_view():
            found = success(module.language_model, batch.requests)
        self.scoring_seconds += time.perf_counter() - start
        return found

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the requests after the edit and write their lines."""
        module = editing_module(self, pl_module)
        report = last_report(module)
        assert self._before is not None
        before, after = self._before, self._success(module, batch)
        first = module.num_requests - len(batch.requests)
        if self.stream:
            self.stream.just_after(range(first, module.num_requests), module.num_requests, after)
        self.seconds += report.seconds
        lines = [
            {
                "num_requests": first + i + 1,
                "request": request.as_dict(),
                "before": before.as_dict(i),
                "after": after.as_dict(i),
                "applied": report.applied,
                "refused": report.refused,
                "update_norm": report.update_norm if report.applied else None,
                "details": report.details[i],
                "seconds": report.seconds,
            }
            for i, request in enumerate(batch.requests)
        ]
        self._lines = [nan_to_null(line) for line in lines]
        with fail_together():
            if self._writes:
                self._write(self._lines)
        for logger in trainer.loggers:
            logger.log_metrics(report.figures(), step=module.num_requests)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        if self.path:
            append_lines(self.path, lines)

    def step_state(self) -> dict[str, Any]:
        """Return the lines of the latest step."""
        lines, self._lines = self._lines, []
        return {"lines": lines} if lines else {}

    def load_step_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Rewrite the file with the lines of the earlier steps."""
        self.seconds += sum(state["lines"][0]["seconds"] for state in states)
        if self.path and self._writes:
            write_lines(self.path, [line for state in states for line in state["lines"]])

    def summary(self) -> dict[str, Any]:
        """Return the seconds spent on edits."""
        return {"edit_s": self.seconds, "edit_log_s": self.scoring_seconds}


def _stream_done(trainer: L.Trainer) -> bool:
    return bool(getattr(trainer.datamodule, "done", ()))  # type: ignore[attr-defined]
