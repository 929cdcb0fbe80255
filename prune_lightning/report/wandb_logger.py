"""Weights & Biases with the number of edits as the x-axis, one run per job."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from prune_lightning.report.tracker import Artifact, TrackedRun, Tracker


class EditWandbLogger(Tracker, WandbLogger):
    """Lightning's logger with every metric drawn against the number of edits, and a run that is its own.

    Lightning's logger joins the run that is active in the process, so that the second job of a sweep would write into
    the run of the first. This one always starts a run, and :meth:`close` ends it. A resumed job continues its run; a
    job of a W&B sweep takes the run that the agent has created.

    Args:
        run: See :class:`Tracker`.
        name: Name of the run; by default what ran.
        group: Group of the run; by default the Hydra multirun.
        id: Id of the run.
        kwargs: See :class:`Tracker` and ``WandbLogger``; ``offline=True`` needs no account.
    """

    def __init__(
        self,
        *,
        run: TrackedRun | None = None,
        name: str | None = None,
        group: str | None = None,
        id: str | None = None,
        **kwargs: Any,
    ) -> None:
        if run is not None:
            name, group = name or run.name[:128], group or run.group  # 128: the longest name that W&B takes
            id = id or run.id("wandb") or _id_of_sweep() or uuid.uuid4().hex[:8]
            run.keep_id("wandb", id)
        own: dict[str, Any] = {"name": name, "group": group, "id": id, "reinit": "create_new"}
        if kwargs.get("offline"):
            own["settings"] = {"quiet": True}  # its history and summary would hide the run's own table
        super().__init__(run=run, **{**own, **kwargs})
        self._axis = run.axis if run else "num_requests"
        self._defined: set[str] = set()

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics that belong to an edit count.

        Args:
            metrics: Values by name, or media.
            step: Number of edits.
        """
        if step is None:
            self.experiment.log(dict(metrics))
            return
        if not self._defined:
            self.experiment.define_metric(self._axis)
        for name in metrics.keys() - self._defined:
            self.experiment.define_metric(name, step_metric=self._axis)
        self._defined |= {self._axis, *metrics}
        self.experiment.log({**metrics, self._axis: step})

    @override
    @rank_zero_only
    def log_summary(self, figures: Mapping[str, float]) -> None:
        """Write the figures into the run's summary, by which runs are sorted and sweeps are steered."""
        self.experiment.summary.update(dict(figures))

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, kind: Artifact) -> None:
        """Log an artifact of the type ``kind``, named after the run."""
        self.experiment.log_artifact(str(path), name=f"{kind}-{self.experiment.id}", type=kind)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End a failed run; one that succeeded stays open for the report, until :meth:`close`."""
        super().finalize(status)
        if status != "success":
            self.close(exit_code=1)

    @override
    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the run."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)


def _id_of_sweep() -> str | None:
    """Return the id of the run that a sweep's agent has created for this process."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
