"""How a job appears in an experiment tracker: what it was, its name, its group and the run that it continues."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

RUN_ID = "wandb_run_id.txt"
_NAMED = ("method", "restraint", "model", "data")
_EDITING = "prune_lightning.tasks.edit.run"


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


def wandb_arguments(config: DictConfig, folder: Path, resumed: bool, write: bool) -> dict[str, Any]:
    """Return what the configuration leaves open of a Weights & Biases run.

    Args:
        config: The job's configuration.
        folder: Where the job's loggers write. The id of the run is kept in it.
        resumed: Whether the job continues the one that ran in the folder, and with it its run.
        write: Whether this process is the one that writes.

    Returns:
        ``name``, ``group`` and ``id``, without those that the configuration has a value for.
    """
    hydra = HydraConfig.get()
    group = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None
    own = {"name": _name(config), "group": group}
    own["id"] = config.logger.get("id") or _run_id(folder / RUN_ID, resumed, write)
    return {key: value for key, value in own.items() if config.logger.get(key) is None}


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
    return ", ".join(words)[:128]  # the longest name that Weights & Biases takes


def _run_id(file: Path, resumed: bool, write: bool) -> str:
    """Return the id that the folder keeps if its job is resumed, else a new one, which it keeps from now on."""
    if resumed and file.is_file():
        return file.read_text("utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    if write:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id + "\n", "utf-8")
    return run_id
