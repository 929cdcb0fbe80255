"""MLflow with the number of edits as the step."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from prune_lightning.report.tracker import Artifact, TrackedRun, Tracker


class EditMLFlowLogger(Tracker, MLFlowLogger):
    """Lightning's logger, whose run a resumed job continues.

    Args:
        run: See :class:`Tracker`.
        run_name: Name of the run; by default what ran.
        run_id: Id of an existing run.
        kwargs: See :class:`Tracker` and ``MLFlowLogger``.
    """

    extra: ClassVar[str | None] = "mlflow"

    def __init__(
        self, *, run: TrackedRun | None = None, run_name: str | None = None, run_id: str | None = None, **kwargs: Any
    ) -> None:
        if run is not None:
            run_name, run_id = run_name or run.name, run_id or run.id("mlflow")
            tags = {"group": run.group} if run.group else {}
            kwargs["tags"] = {**tags, **(kwargs.get("tags") or {})}
        super().__init__(run=run, run_name=run_name, run_id=run_id, **kwargs)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyper-parameters. MLflow never changes one: of a resumed run only new ones are written."""
        assert self.run_id is not None
        if self.run is not None:
            self.run.keep_id("mlflow", self.run_id)
        known = self.experiment.get_run(self.run_id).data.params
        given = _flatten_dict(_convert_params(params))
        super().log_hyperparams({key: value for key, value in given.items() if key not in known})
        self.experiment.update_run(self.run_id, status="RUNNING")

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        """Write a table as CSV among the run's artifacts.

        Args:
            key: Name of the table.
            columns: Titles of the columns.
            data: The rows.
            step: Number of edits.
        """
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([columns, *data])
        self.experiment.log_text(self.run_id, text.getvalue(), f"{key}.csv")

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Write pictures among the run's artifacts.

        Args:
            key: Name of the picture.
            images: Pictures of PIL.
            step: Number of edits.
        """
        for number, image in enumerate(images):
            self.experiment.log_image(self.run_id, image, f"{key}{f'_{number}' if number else ''}.png")

    @override
    @rank_zero_only
    def log_summary(self, figures: Mapping[str, float]) -> None:
        """Log the figures as metrics at step 0."""
        self.log_metrics(figures, step=0)

    @override
    @rank_zero_only
    def log_artifact(self, path: Path, kind: Artifact) -> None:
        """Log the file, or the files of the folder, among the run's artifacts."""
        if path.is_dir():
            self.experiment.log_artifacts(self.run_id, str(path), path.name)
        else:
            self.experiment.log_artifact(self.run_id, str(path))
