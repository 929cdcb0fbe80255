"""How a job appears in an experiment tracker: what it was, its name, its group and the run that it continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from prune_lightning.errors import UserError
from prune_lightning.report.tracker import Artifact, TrackedRun, Tracker
from prune_lightning.tasks.components import arguments_of, build, check_component, in_one_line, located

_NAMED = ("method", "restraint", "model", "data")
_EDITING = "prune_lightning.tasks.edit.run"
_PLACES: Mapping[Artifact, str] = {"ledger": "ledger", "export": "export", "report": "report.html"}


def tracked_run(config: DictConfig, folder: Path, kept: int | None, writes: bool) -> TrackedRun:
    """Return the job as trackers know it.

    Args:
        config: The job's configuration.
        folder: Where the job's loggers write.
        kept: When a run is resumed, the step up to which its records are kept; ``None`` for a new run.
        writes: Whether this process is the one that writes.
    """
    hydra = HydraConfig.get()
    group = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None
    axis = "num_requests" if config.task == _EDITING else "trainer/global_step"
    return TrackedRun(folder, _name(config), group, axis, kept, writes)


def loggers_of(config: DictConfig, run: TrackedRun) -> Iterator[Logger]:
    """Yield the configured loggers, each with the job's hyper-parameters.

    A logger that takes an argument ``run`` is given the job.

    Raises:
        UserError: A logger cannot be started, such as for a package that is not installed.
    """
    for name, node in (config.logger or {}).items():
        if node is None:
            continue
        key = f"logger.{name}"
        check_component(node, key)
        kind = located(node._target_, f"{key}._target_")
        own = {"run": run} if "run" in arguments_of(kind).kinds else {}
        _check_artifacts(config, node, key)
        with in_one_line(f"{key}: it cannot be started"):
            try:
                logger: Logger = build(node, key, **own)
                logger.log_hyperparams(hyperparameters(config))
            except Exception as error:
                if _missing_package(error):
                    extra = getattr(kind, "extra", None)
                    how = f": pip install 'prune-lightning[{extra}]'" if extra else f": {' '.join(str(error).split())}"
                    raise UserError(f"{key} needs a package that is not installed{how}") from error
                raise
        yield logger


def _missing_package(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, ImportError) or _missing_package(error.__cause__))


def _check_artifacts(config: DictConfig, node: DictConfig, key: str) -> None:
    """Refuse artifacts that the job does not make."""
    wanted = list(node.get("artifacts") or ())
    if "ledger" in wanted and not config.ledger:
        raise UserError(f"{key}.artifacts: there is no ledger to upload: set ledger=true, or leave it out")
    if "export" in wanted and not config.export:
        raise UserError(f"{key}.artifacts: there is no export to upload: set export=full, or leave it out")


def hand_over(loggers: Sequence[Logger], figures: Mapping[str, float], folder: Path) -> None:
    """Give the trackers among some loggers the figures of the run, and the artifacts that they are asked to upload.

    Args:
        loggers: The loggers.
        figures: Figures of the whole run.
        folder: The run's folder.
    """
    for tracker in loggers:
        if isinstance(tracker, Tracker):
            tracker.log_summary(figures)
            for kind in tracker.artifacts:
                tracker.log_artifact(folder / _PLACES[kind], kind)


def hyperparameters(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as loggers store it.

    ``method``, ``restraint``, ``model`` and ``data`` are the names of the chosen options, by which runs can be
    filtered and grouped; ``settings`` is the whole configuration.

    Args:
        config: The job's configuration.
    """
    choices = HydraConfig.get().runtime.choices
    chosen = {group: str(choices[group]) for group in _NAMED}
    return {**chosen, "seed": config.seed, "settings": OmegaConf.to_container(config, resolve=True)}


def _name(config: DictConfig) -> str:
    """Return a name such as `memit + prune on gpt2-xl, zsre, seed 1, data.num_edits=200`."""
    hydra = HydraConfig.get()
    choices = hydra.runtime.choices
    if config.task == _EDITING:
        words = [
            f"{choices['method']} + {choices['restraint']} on {choices['model']}",
            str(choices["data"]),
            f"seed {config.seed}",
        ]
    else:
        words = [f"{str(config.task).split('.')[-2]} of {choices['model']}", f"seed {config.seed}"]
    keys = [(str(word), str(word).partition("=")[0]) for word in hydra.overrides.task]
    words += [word for word, key in keys if "." in key and not key.startswith("logger.")]
    return ", ".join(words)
