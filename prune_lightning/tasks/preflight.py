"""What can be known before the first computation is checked there, so that no run fails hours later because of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from omegaconf import DictConfig

from prune_lightning.callbacks import Restraint
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError, one_of
from prune_lightning.evaluation.measurement import Measurement
from prune_lightning.export.formats import FORMATS, check_base, check_weights, format_named
from prune_lightning.export.sources import check_in_weights
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.family import matrix_shapes
from prune_lightning.tasks.presets import model_facts
from prune_lightning.tasks.setup import choice


def formats_wanted(config: DictConfig) -> list[str]:
    """Return the formats of ``config.export``.

    Raises:
        UserError: An unknown format, or one that cannot export this model.
    """
    wanted = [config.export] if isinstance(config.export, str) else list(config.export or ())
    for name in wanted:
        one_of("export", str(name), FORMATS)
        check_base(str(name), str(config.model.path))
    return wanted


def check_run(
    config: DictConfig,
    module: EditingModule,
    stream: EditStream,
    restraint: Restraint | None,
    measurements: Sequence[Measurement],
) -> None:
    """Check that method, evaluation and exports have what they need.

    Args:
        config: The job's configuration.
        module: The method.
        stream: The stream, set up.
        restraint: The restraint; ``None`` without one.
        measurements: What is measured.

    Raises:
        UserError: One line about the first thing that is missing, or that does not go together.
    """
    model_facts(config)  # the report needs them
    wanted, base = formats_wanted(config), str(config.model.path)
    _check_exports(wanted, config.export_merged, module, stream, restraint)
    for name in wanted:
        check_weights(name, base, matrix_shapes(module.edited_modules()), module.language_model.num_layers)
    for measurement in measurements:
        if measurement.enabled:
            measurement.check(module.language_model, stream.requests)
    module.check()


def _check_exports(
    wanted: Sequence[str], merged: bool, module: EditingModule, stream: EditStream, restraint: Restraint | None
) -> None:
    if wanted and stream.protocol.from_base:
        raise UserError(
            f"data.protocol={stream.protocol.value} leaves no edited model; export belongs to sequential protocols"
        )
    for name in wanted:
        check_in_weights(module.in_weights, module.mergeable, merged, f"method={choice('method')}", name)
    causes = [f"method={choice('method')}"] if not module.low_rank else []
    causes += [f"restraint={choice('restraint')}"] if restraint and not restraint.low_rank else []
    for name in wanted:
        if causes and format_named(name).LOW_RANK_ONLY:
            raise UserError(
                f"export={name} holds changes of low rank only, and those of {' and '.join(causes)} are not; "
                "export full or delta"
            )


def check_bisection(config: DictConfig, ledger: Any, restraint: Any, stream: EditStream, trainer: L.Trainer) -> None:
    """Refuse a bisection of collapses that cannot be done.

    Raises:
        UserError: It needs a ledger, a sequential protocol, a restraint that is not at the end, and one process.
    """
    if not config.bisect_collapse:
        return
    if ledger is None or getattr(restraint, "schedule", "") == "end":
        raise UserError("bisect_collapse rebuilds earlier states: it needs ledger=true, and no restraint at the end")
    if stream.protocol.from_base:
        raise UserError(
            f"bisect_collapse rebuilds states along a stream, but data.protocol={stream.protocol.value} restores the "
            "unedited model after every step"
        )
    if trainer.world_size > 1:
        raise UserError("bisect_collapse runs in one process: leave it out, or use a trainer with one device")
