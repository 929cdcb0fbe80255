"""Logs the progress of a run: the time of each phase and the scores at each evaluated edit count."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from prune_lightning.methods.base import EditingModule
from prune_lightning.phases import Phase, PhaseClock, duration

from ._lightning import LightningCallback
from .edit_evaluation import EditEvaluation

SHOWN = ("efficacy", "efficacy_score", "retention")


class RunLog(LightningCallback):
    """Logs a line when a phase ends, one per evaluated count, and one a minute inside a long phase.

    The lines go to Python's ``logging``, from rank 0 only. List it after the evaluation.

    Args:
        clock: The run's clock.
        every: Seconds between two lines inside a phase.
        now: Monotonic time, in seconds.
    """

    def __init__(self, clock: PhaseClock, every: float = 60.0, now: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.every, self._now = clock, every, now
        self._logger = logging.getLogger(__name__)
        self._last = now()
        self._reported: float = 0
        clock.watch(self)

    @rank_zero_only
    def _say(self, line: str) -> None:
        self._last = self._now()
        self._logger.info(line)

    def advanced(self, phase: Phase) -> None:
        """Log a line if the last one is at least ``every`` seconds old."""
        if self._now() - self._last >= self.every:
            self._say(_steps(phase))

    def ended(self, phase: Phase, outermost: bool) -> None:
        """Log the time of a phase, unless it will continue or took a negligible time."""
        if (outermost or phase.complete) and phase.active >= 0.05:
            self._say(f"{phase.name}: {duration(phase.active)}")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset for a new stream."""
        self._reported = 0

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the scores if the edits have just been evaluated."""
        self._report(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores at the end of a stream that ended early."""
        self._report(trainer, pl_module)

    def _report(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        evaluations = [c for c in trainer.callbacks if isinstance(c, EditEvaluation)]  # type: ignore[attr-defined]
        scores = evaluations[0].curve[-1] if evaluations and evaluations[0].curve else {"num_requests": 0}
        count = scores["num_requests"]
        if isinstance(module, EditingModule) and count == module.num_requests and count > self._reported:
            self._reported = count
            line = _steps(self.clock.named("edit"), self.clock.named("evaluate").time_left or 0.0)
            self._say(f"{line}: {_figures(scores)}")


def _steps(phase: Phase, more: float = 0.0) -> str:
    """Return the progress of a phase, such as `edit 40/100, 3.1 edits/s, 19 s left`.

    Args:
        phase: The phase.
        more: Seconds to add to the time left.
    """
    unit = "edits" if phase.name == "edit" else "steps"
    words = [f"{phase.name} {phase.done:.0f}/{phase.total:.0f}" if phase.total else f"{phase.name} {phase.done:.0f}"]
    if phase.pace:
        slow = f"{phase.pace:.1f} s per {unit.removesuffix('s')}"
        words.append(f"{1 / phase.pace:.1f} {unit}/s" if phase.pace < 1 else slow)
    if phase.time_left is not None:
        words.append(f"{duration(phase.time_left + more)} left")
    return ", ".join(words)


def _figures(scores: Mapping[str, float]) -> str:
    """Return efficacy and retention of each measurement, under its full name where there is more than one."""
    keys = [key for key in scores if key.rpartition("/")[2] in SHOWN and scores[key] == scores[key]]
    names = [key.rpartition("/")[2].removesuffix("_score") for key in keys]
    return ", ".join(
        f"{name if names.count(name) == 1 else key} {scores[key]:.2f}" for name, key in zip(names, keys, strict=True)
    )
