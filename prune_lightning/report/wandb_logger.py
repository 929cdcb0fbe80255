"""Weights & Biases with the number of edits as the x-axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only


class EditWandbLogger(WandbLogger):
    """Lightning's logger, every metric drawn against ``num_requests``.

    Args:
        kwargs: See ``WandbLogger``; ``offline=True`` needs no account.
    """

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
