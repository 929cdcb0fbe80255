"""Trackio, Hugging Face's tracker, with the number of edits as the step."""

from __future__ import annotations

import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from prune_lightning.report.tracker import Artifact, TrackedRun, Tracker


class TrackioLogger(Tracker, Logger):
    """Logs to Trackio. A resumed job continues its run, which Trackio knows by its name.

    Args:
        project: The project.
        run: See :class:`Tracker`.
        name: Name of the run; by default what ran, and an id.
        group: Group of the run; by default the Hydra multirun.
        space_id: A Hugging Face Space to log to; a local database by default, in ``TRACKIO_DIR``.
        kwargs: See :class:`Tracker`.

    Raises:
        ModuleNotFoundError: Trackio is not installed.
    """

    extra: ClassVar[str | None] = "trackio"

    def __init__(
        self,
        *,
        project: str,
        run: TrackedRun | None = None,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        import trackio

        super().__init__(run=run, **kwargs)
        self._trackio, self._experiment = trackio, None
        self._project, self._space, self._group = project, space_id, group or (run.group if run else None)
        known = run.id("trackio") if run else None
        self._name = name or known or f"{run.name if run else project}, {uuid.uuid4().hex[:8]}"
        if run is not None:
            run.keep_id("trackio", self._name)

    @property
    @override
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    @override
    def version(self) -> str:
        """The name of the run."""
        return self._name

    def _begin(self, config: dict[str, Any] | None = None) -> Any:
        """Return the run; it is started on the first call, with the configuration."""
        if self._experiment is None:
            where = {"group": self._group, "space_id": self._space, "embed": False}
            quiet = {"auto_log_gpu": False, "auto_log_cpu": False}
            self._experiment = self._trackio.init(
                self._project, self._name, config=config, resume="allow", **where, **quiet
            )
        return self._experiment

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Start the run with its configuration."""
        self._begin(_convert_params(params))

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values, or media, of a step."""
        self._begin().log(dict(metrics), step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table.

        Args:
            key: Name of the table.
            columns: Titles of the columns.
            data: The rows.
            step: Number of edits.
        """
        self.log_metrics({key: self._trackio.Table(columns=list(columns), data=[list(row) for row in data])}, step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Log pictures.

        Args:
            key: Name of the picture.
            images: Pictures of PIL.
            step: Number of edits.
        """
        names = [f"{key}{f'_{number}' if number else ''}" for number in range(len(images))]
        self.log_metrics({n: self._trackio.Image(image) for n, image in zip(names, images, strict=True)}, step)

    @override
    @rank_zero_only
    def log_summary(self, figures: Mapping[str, float]) -> None:
        """Log the figures at the step of the run's end; Trackio has no summary of its own."""
        self._begin().log(dict(figures), step=None)

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, kind: Artifact) -> None:
        """Log an artifact of the type ``kind``."""
        self._begin().log_artifact(str(path), name=kind, type=kind)

    @override
    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the run."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None
