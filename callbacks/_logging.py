"""Log figures to the Trainer's loggers, on the x-axis that fits the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning as L

from prune_lightning.spectral import HasEditedMatrices


def axis(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Return the number of edits for an editing module, the number of optimizer steps for any other."""
    return module.num_requests if isinstance(module, HasEditedMatrices) else trainer.global_step


def log_metrics(
    trainer: L.Trainer, module: L.LightningModule, figures: Callable[[], Mapping[str, float]], always: bool = False
) -> None:
    """Log figures every ``log_every_n_steps`` of the Trainer, or always; they are computed only if logged."""
    cadence = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if always or (cadence and trainer.global_step % cadence == 0):
        metrics = dict(figures())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=axis(trainer, module))
