"""Weights & Biases with the number of edits as the x-axis, one run per job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override


class EditWandbLogger(WandbLogger):
    """Lightning's logger with every metric drawn against ``num_requests``, and a run that is its own.

    Lightning's logger joins the run that is active in the process, so that the second job of a sweep would write into
    the run of the first. This one always starts a run, and :meth:`close` ends it.

    Args:
        kwargs: See ``WandbLogger``; ``offline=True`` needs no account.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"reinit": "create_new", **kwargs})

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
        self.experiment.define_metric("num_requests")
        for name in metrics:
            self.experiment.define_metric(name, step_metric="num_requests")
        self.experiment.log({**metrics, "num_requests": step})

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End a failed run; one that succeeded stays open for the report, until :meth:`close`."""
        super().finalize(status)
        if status != "success":
            self.close(exit_code=1)

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the run.

        Args:
            exit_code: Anything but 0 marks the run as failed.
        """
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)
