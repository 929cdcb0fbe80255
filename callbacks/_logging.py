"""Hand figures to the Trainer's loggers on the axis that fits the module."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L

from prune_lightning.spectral import HasEditedMatrices


def axis(trainer: L.Trainer, module: L.LightningModule) -> int:
    """Return the number of edits of an editing module, the number of optimizer steps of any other."""
    return module.num_edits if isinstance(module, HasEditedMatrices) else trainer.global_step


def log_metrics(
    trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float], always: bool = False
) -> None:
    """Log figures at the Trainer's own cadence (``log_every_n_steps``), or always."""
    if always or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=axis(trainer, module))
