"""The command line's arguments and the settings that every task shares, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import hydra
from annotated_types import Ge, Le
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from prune_lightning.errors import UserError
from prune_lightning.ranges import Count
from prune_lightning.tasks.choices import config_folder, preset_for
from prune_lightning.value_types import check_value

_LARGEST_SEED = 2**32 - 1  # of NumPy
_SETTINGS = {
    "task": str,
    "seed": Annotated[int, Ge(0), Le(_LARGEST_SEED)],
    "control": bool,
    "non_finite": Literal["skip", "raise"],
    "ledger": bool,
    "resume": str | None,
    "snapshot_every": Count | None,
    "bisect_collapse": bool,
    "progress": bool,
    "all_scores": bool,
    "export": str | list[str] | None,
    "export_merged": bool,
}
_RESUME = "resume="
_RECORD = ".hydra"  # where Hydra would write it
AUTO = "auto"
"""What ``resume`` is set to if a job continues whatever lies in its folder."""


def full_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line with what it implies.

    With ``resume=RUN``, it is the one that the run was begun with, and what is overridden now. With ``model.path=PATH``
    and no option of ``model``, the option is that of this path, or ``auto``: the default is the bundled model's.

    Args:
        arguments: The command line.

    Raises:
        UserError: RUN is no folder of a run.
    """
    wanted = [word.removeprefix(_RESUME) for word in arguments if word.startswith(_RESUME)]
    if not wanted or wanted[-1] in ("", "null", AUTO):
        return [*_model_option(arguments), *arguments]
    run = Path(wanted[-1]).expanduser().resolve()
    known = run / _RECORD / "overrides.yaml"
    if not known.is_file():
        raise UserError(f"resume: {str(run)!r} is not the folder of a run: there is no {_RECORD}/overrides.yaml in it")
    earlier = [str(word) for word in OmegaConf.to_object(OmegaConf.load(known))]  # type: ignore[union-attr]
    now = [word for word in arguments if not word.startswith((_RESUME, "hydra.run.dir="))]
    return (
        [word for word in earlier if not word.startswith(_RESUME)] + now + [f"{_RESUME}{run}", f"hydra.run.dir={run}"]
    )


def _model_option(arguments: Sequence[str]) -> list[str]:
    given = dict(word.lstrip("+").partition("=")[::2] for word in arguments)
    if "model.path" not in given or "model" in given or ("experiment" in given and _names_model(given)):
        return []
    option, _ = preset_for(given["model.path"].strip("'\""))
    return [f"model={option}"]


def _names_model(given: Mapping[str, str]) -> bool:
    """Whether the experiment of a command line chooses a model itself."""
    words = [f"{key}={given[key]}" for key in ("experiment", "hydra.searchpath") if key in given]
    chosen = []
    for overrides in ([], words):
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            try:
                config = hydra.compose("train", overrides=overrides, return_hydra_config=True)
            except HydraException:  # a sweep over experiments, or an unknown one, which is said later
                return True
        chosen.append(config.hydra.runtime.choices.model)
    return chosen[0] != chosen[1]


def record_settings(config: DictConfig) -> None:
    """Write the job's configuration and overrides to its folder, in the files in which Hydra writes them.

    Hydra writes them before the job starts. A job that is refused, since it would resume a run with other settings,
    would then have replaced those of the run.
    """
    job = HydraConfig.instance().cfg
    assert job is not None
    folder = recorded_settings()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"config": config, "hydra": job, "overrides": HydraConfig.get().overrides.task}
    for name, part in parts.items():
        (folder / f"{name}.yaml").write_text(OmegaConf.to_yaml(part), "utf-8")


def recorded_settings() -> Path:
    """Return the folder for the settings of the job's run."""
    return Path(HydraConfig.get().runtime.output_dir, _RECORD)


def check_settings(config: DictConfig) -> None:
    """Check that no setting lacks a value, and that the top-level ones have values of the right type.

    Args:
        config: The job's configuration.

    Raises:
        UserError: One line that names the setting and what it can be.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError("these settings need a value: " + ", ".join(f"{key}=..." for key in missing))
    for name, kind in _SETTINGS.items():
        if name in config:
            value = config[name]
            check_value(name, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value, kind)
