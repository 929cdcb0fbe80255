"""A progress display with named phases and a time left that is measured, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text
from typing_extensions import override

from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch


class _Seconds(ProgressColumn):
    """Time spent inside the phase, and an estimate of what is left of it from its own pace."""

    max_refresh = 0.2

    def render(self, task: Task) -> Text:
        """Return ``spent`` or ``spent, left``."""
        active = float(task.fields["active"])
        done, total = task.completed, task.total
        if task.finished or not total or not done:
            return Text(f"{active:5.1f} s", style="progress.elapsed")
        return Text(f"{active:5.1f} s, {active / done * (total - done):.0f} s left", style="progress.remaining")


class RunProgress(L.Callback):
    """Shows the phases of a run: load, baseline, statistics, edit, evaluate.

    Each phase has a clock that runs only while the phase does, so the time left of the edits is not spoilt by the
    evaluations between them. List it directly after the restraint: an edit's time then includes its restraint.

    Args:
        console: Where to draw; the terminal by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Seconds(),
            console=self.console,
        )
        self._tasks: dict[str, Any] = {}
        self._edit_started = 0.0
        self.prefix = ""

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def _task(self, phase: str, total: int) -> Any:
        phase = self.prefix + phase
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total, active=0.0)
        return self._tasks[phase]

    def _add(self, task: Any, seconds: float, steps: int) -> None:
        active = self._progress.tasks[self._progress.task_ids.index(task)].fields["active"]
        self._progress.update(task, advance=steps, active=active + seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase of a single step."""
        task, start = self._task(name, 1), time.perf_counter()
        yield
        self._add(task, time.perf_counter() - start, 1)

    def track(self, items: Iterable[Any], phase: str, total: int) -> Iterator[Any]:
        """Show a loop; calling it again for the same phase goes on counting."""
        task, start = self._task(phase, total), time.perf_counter()
        for item in items:
            yield item
            now = time.perf_counter()
            self._add(task, now - start, 1)
            start = now

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the module report its own loops."""
        if isinstance(pl_module, EditingModule):
            pl_module.track = self.track

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Start the edit's clock."""
        self._edit_started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Count the edits of the batch."""
        total = len(trainer.datamodule.requests)  # type: ignore[attr-defined]
        self._add(self._task("edit", total), time.perf_counter() - self._edit_started, len(batch.requests))
