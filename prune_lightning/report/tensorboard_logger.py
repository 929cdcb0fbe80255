"""TensorBoard in the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from prune_lightning.ranges import Count, Whole
from prune_lightning.report.tracker import Artifact, TrackedRun, Tracker


class EditTensorBoardLogger(Tracker, TensorBoardLogger):
    """Lightning's logger with the number of edits as the step. A resumed run hides the points it takes again.

    Args:
        save_dir: Folder of the event files.
        run: See :class:`Tracker`.
        artifacts: See :class:`Tracker`.
        max_edits: See :class:`Tracker`.
        flush_secs: Seconds between two writes.
    """

    extra: ClassVar[str | None] = "tensorboard"

    def __init__(
        self,
        *,
        save_dir: str,
        run: TrackedRun | None = None,
        artifacts: Sequence[Artifact] = (),
        max_edits: Whole = 200,
        flush_secs: Count = 120,
    ) -> None:
        further: dict[str, Any] = {"flush_secs": flush_secs}
        if run and run.kept is not None:
            further["purge_step"] = run.kept + 1
        own = {"save_dir": save_dir, "name": "", "version": "", "default_hp_metric": False}
        super().__init__(run=run, artifacts=artifacts, max_edits=max_edits, **own, **further)

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table as text in Markdown.

        Args:
            key: Name of the table.
            columns: Titles of the columns.
            data: The rows.
            step: Number of edits.
        """
        lines = [list(columns), ["---"] * len(columns), *data]
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step)

    @override
    @rank_zero_only
    def log_summary(self, figures: Mapping[str, float]) -> None:
        """Write the figures beside the hyper-parameters, which TensorBoard shows in one table."""
        super().log_hyperparams(self.hparams, metrics=dict(figures))

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, kind: Artifact) -> None:
        """Copy the file or the folder beside the event files: TensorBoard has no artifacts."""
        target = Path(self.log_dir) / "artifacts" / path.name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)

    @override
    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """Write what is left."""
        self.experiment.close()


def _cell(value: Any) -> str:
    """Return a value as a cell of a Markdown table."""
    return " ".join(str("" if value is None else value).replace("\\", "\\\\").replace("|", "\\|").split())
