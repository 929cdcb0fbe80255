"""Writes one JSON line per edit, as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from prune_lightning.evaluation.stream import StreamScores, Success, success
from prune_lightning.json_files import append_lines, nan_to_null, replace_lines
from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch


class EditLog(L.Callback):
    """Logs every request with its success just before and just after the edit, its update's norm, and the seconds.

    List it after the restraint, so that "after" is the restrained model.

    Args:
        path: The JSONL file; written anew. ``None`` for no file.

    Attributes:
        seconds: Sum of the edits' seconds.
        scoring_seconds: Time spent on scoring the requests before and after.
        stream: Takes the same scores, if there is one: nothing is scored twice.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.seconds = 0.0
        self.scoring_seconds = 0.0
        self.stream: StreamScores | None = None
        self._before: Success | None = None
        self._lines: list[dict[str, Any]] = []
        self._writes = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file; a resumed run keeps it until the earlier steps are put back."""
        assert isinstance(pl_module, EditingModule)
        self._writes = trainer.is_global_zero
        if self.path and self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if pl_module.go_on is None:
                self.path.write_text("")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the requests before they are written."""
        assert isinstance(pl_module, EditingModule)
        self._before = self._success(pl_module, batch)
        if self.stream:
            cases = range(pl_module.num_edits, pl_module.num_edits + len(batch.requests))
            self.stream.just_before(cases, pl_module.num_edits, self._before)

    def _success(self, module: EditingModule, batch: EditBatch) -> Success:
        start = time.perf_counter()
        with module.phase_clock.part("scores"), module.evaluation_view():
            found = success(module.language_model, batch.requests)
        self.scoring_seconds += time.perf_counter() - start
        return found

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the requests again and write their lines."""
        assert isinstance(pl_module, EditingModule)
        report = pl_module.last_report
        assert report is not None
        assert self._before is not None
        before, after = self._before, self._success(pl_module, batch)
        first = pl_module.num_edits - len(batch.requests)
        if self.stream:
            self.stream.just_after(range(first, pl_module.num_edits), pl_module.num_edits, after)
        self.seconds += report.seconds
        lines = [
            {
                "num_edits": first + i + 1,
                "request": request.as_dict(),
                "before": before.as_dict(i),
                "after": after.as_dict(i),
                "applied": report.applied,
                "refused": report.refused,
                "update_norm": report.update_norm if report.applied else None,
                **report.details[i],
                "seconds": report.seconds,
            }
            for i, request in enumerate(batch.requests)
        ]
        self._lines = [nan_to_null(line) for line in lines]
        if self._writes:
            self._write(self._lines)
        for logger in trainer.loggers:
            logger.log_metrics(
                {"edit/update_norm": report.update_norm, "edit/seconds": report.seconds}, step=pl_module.num_edits
            )

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        if self.path:
            append_lines(self.path, lines)

    def step(self) -> dict[str, Any]:
        """Return the lines of the latest step."""
        return {"lines": self._lines}

    def take_up(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Have the file hold the lines of earlier steps, and no others."""
        self.seconds += sum(step["lines"][0]["seconds"] for step in steps)
        if self.path and self._writes:
            replace_lines(self.path, [line for step in steps for line in step["lines"]])
