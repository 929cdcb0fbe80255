"""Shared setup of all jobs: the run's folder, earlier results, trainer and loggers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.trainer_checks import check_trainer, weights_dtype
from prune_lightning.phases import PhaseClock, process_age
from prune_lightning.report.tracker import ID_FILE
from prune_lightning.tasks.components import build, in_one_line, located
from prune_lightning.tasks.tracking import loggers_of, tracked_run
from prune_lightning.types import EditRequest

_OF_EDITING = ("summary.json", "metrics.csv", "edits.jsonl", "cases.jsonl", "quarantine.jsonl", "plots", "report.html")
RESULTS = (
    *_OF_EDITING,
    "export",
    "ledger",
    "check.json",
    "plan.json",
    "knowledge.json",
    "hparams.yaml",
    "tuning.json",
    "trials.log",
    "error.txt",
    "tensorboard",
)

# Warnings of libraries that do not apply here: the stream is text, its loader needs no workers, and so on.
_BESIDE_THE_POINT = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*Experiment logs directory.*",
    ".*smaller than the logging interval.*",
    ".*in eval mode at the start of training.*",
    ".*overridden `transfer_batch_to_device`.*",
    ".*GPU available but not used.*",
)


def first_process() -> bool:
    """Whether this is rank 0 of a distributed run."""
    return not getattr(rank_zero_only, "rank", 0)


def run_folder(resumed: bool = False) -> Path:
    """Return the run's folder. Results of an earlier run in it are moved aside, unless it is resumed."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if resumed:
        return folder
    earlier = [*(folder / name for name in RESULTS if (folder / name).exists()), *folder.glob(ID_FILE.format("*"))]
    if earlier and first_process():
        aside = folder / f"earlier_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        aside.mkdir(parents=True)
        for path in earlier:
            path.rename(aside / path.name)
    return folder


def choice(group: str) -> str:
    """Return the chosen option of a group."""
    return str(HydraConfig.get().runtime.choices[group])


def usable_by(method: DictConfig | None) -> Callable[[EditRequest], str | None] | None:
    """Return the configured method's ``unusable`` function; ``None`` without a method.

    Raises:
        UserError: The method's class does not exist.
    """
    if method and "editor" in method:  # a method around another one
        return usable_by(method.editor)
    target = method.get("_target_") if method else None
    return None if target is None else getattr(located(target, "method._target_"), "unusable", None)


def quieten() -> None:
    """Hide warnings of libraries that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for pattern in _BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", pattern)


def run_clock() -> PhaseClock:
    """Return the clock of the job. The time of the process so far, such as imports, is the phase ``start``."""
    hydra = HydraConfig.get()
    later = hydra.mode == RunMode.MULTIRUN and bool(hydra.job.num)  # the process has run other jobs before
    return PhaseClock(start=0.0 if later else process_age())


def build_loggers(config: DictConfig, folder: Path, keep: int | None = None) -> list[Logger]:
    """Return the loggers of the configuration.

    Args:
        config: The job's configuration.
        folder: The run's folder.
        keep: When a run is resumed, the step up to which its records are kept; ``None`` for a new run.
    """
    return list(loggers_of(config, tracked_run(config, folder, keep, first_process())))


def close_loggers(loggers: Sequence[Logger]) -> None:
    """End the runs of loggers that have one, when nothing more will be logged."""
    for logger in loggers:
        if hasattr(logger, "close"):
            logger.close()


def build_trainer(
    config: DictConfig,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger],
    folder: Path | None = None,
    **further: Any,
) -> L.Trainer:
    """Return the configured Trainer.

    Args:
        config: The job's configuration.
        callbacks: Callbacks, in order.
        loggers: Loggers; empty for none.
        folder: Default folder of callbacks and loggers.
        further: Arguments that take precedence over the configured ones.
    """
    for name, instead in (("callbacks", "callbacks=..."), ("logger", "logger=...")):
        if name in config.trainer:
            raise UserError(f"trainer.{name} is chosen by {instead}")
    if config.trainer.get("accelerator") in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise UserError(
            f"trainer: PyTorch {torch.__version__} finds no GPU; choose trainer=cpu, or install a build of PyTorch for "
            "this machine's GPU"
        )
    own = {"callbacks": list(callbacks), "logger": list(loggers) or False, "default_root_dir": folder}
    with in_one_line("trainer: Lightning does not take these arguments"):
        trainer = build(config.trainer, "trainer", **own, **further)
    assert isinstance(trainer, L.Trainer)
    return trainer


def fit(trainer: L.Trainer, module: EditingModule, stream: EditStream) -> None:
    """Edit, and leave the module where it was edited: a Trainer moves it to the CPU at its end."""
    trainer.fit(module, datamodule=stream)
    module.to(trainer.strategy.root_device)


def settle_trainer(config: DictConfig) -> None:
    """Refuse Trainer arguments that an edit stream does not support, before anything is loaded.

    ``trainer.precision`` sets the dtype in which the model is loaded, so that everything that uses ``model.dtype``,
    such as the ledger, agrees with it.

    Raises:
        UserError: See :func:`prune_lightning.methods.trainer_checks.check_trainer`.
    """
    trainer = build_trainer(config, [], [])
    check_trainer(trainer)
    config.model.dtype = weights_dtype(trainer) or config.model.dtype
