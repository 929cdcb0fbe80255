"""What an experiment tracker is told of a run beside its metrics, and the run that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from prune_lightning.ranges import Whole

Artifact: TypeAlias = Literal["ledger", "export", "report"]
ID_FILE = "{}_run_id.txt"  # in a run's folder, for each tracker


class TrackedRun:
    """A job, as its trackers know it.

    It is no dataclass: Hydra would turn one into a dictionary on its way to the logger.

    Args:
        folder: The run's folder.
        name: What ran, such as `memit + prune on gpt2-xl, zsre, seed 1`.
        group: The sweep of a job of a multirun; ``None`` for a single job.
        axis: Name of the x-axis.
        kept: The step up to which earlier records are kept, if the run is resumed; ``None`` for a new run.
        writes: Whether this process is the one that writes.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        group: str | None = None,
        axis: str = "num_requests",
        kept: int | None = None,
        writes: bool = True,
    ) -> None:
        self.folder, self.name, self.group, self.axis = folder, name, group, axis
        self.kept, self.writes = kept, writes

    def id(self, tracker: str) -> str | None:
        """Return the id that the folder keeps, if the run is resumed."""
        file = self.folder / ID_FILE.format(tracker)
        return file.read_text("utf-8").strip() if self.kept is not None and file.is_file() else None

    def keep_id(self, tracker: str, run_id: str) -> None:
        """Keep the id in the folder, for :meth:`id`."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ID_FILE.format(tracker)).write_text(run_id + "\n", "utf-8")


class Tracker:
    """Beside a Lightning logger: what a run hands over at its end. Derive from this class first, then from a logger.

    ``log_table(key, columns, data, step)`` and ``log_image(key, images, step)`` are called on every logger that has
    them.

    Args:
        run: The job; ``None`` outside a job.
        artifacts: Parts of the run's folder that are uploaded at the end: ``ledger``, ``export``, ``report``.
        max_edits: Largest number of rows of the table of edits, evenly spaced; 0 for no table.
        kwargs: Arguments of the logger.

    Attributes:
        extra: The extra of this package that installs the tracker; ``None`` if it is always there.
    """

    extra: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        run: TrackedRun | None = None,
        artifacts: Sequence[Artifact] = (),
        max_edits: Whole = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.run, self.artifacts, self.max_edits = run, tuple(artifacts), max_edits

    def log_summary(self, figures: Mapping[str, float]) -> None:
        """Log figures of the whole run, which belong to no step.

        Args:
            figures: Values by name.
        """
        raise NotImplementedError

    def log_artifact(self, path: Path, kind: Artifact) -> None:
        """Upload a file or a folder.

        Args:
            path: The file or the folder.
            kind: What it is.
        """
        raise NotImplementedError

    def close(self, exit_code: int = 0) -> None:
        """End the run in the tracker, when nothing more will be logged.

        Args:
            exit_code: Anything but 0 marks the run as failed.
        """
