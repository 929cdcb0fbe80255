"""The command line's arguments and the settings that every task shares, checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prune_lightning.errors import UserError
from prune_lightning.ranges import Count
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
    """Return the command line of a run to resume: the one it was begun with, and what is overridden now.

    Args:
        arguments: The command line; without ``resume=RUN`` in it, or with ``resume=auto``, it is returned as it is.

    Raises:
        UserError: RUN is no folder of a run.
    """
    wanted = [word.removeprefix(_RESUME) for word in arguments if word.startswith(_RESUME)]
    if not wanted or wanted[-1] in ("", "null", AUTO):
        return list(arguments)
    run = Path(wanted[-1]).expanduser().resolve()
    known = run / _RECORD / "overrides.yaml"
    if not known.is_file():
        raise UserError(f"resume: {str(run)!r} is not the folder of a run: there is no {_RECORD}/overrides.yaml in it")
    earlier = [str(word) for word in OmegaConf.to_object(OmegaConf.load(known))]  # type: ignore[union-attr]
    now = [word for word in arguments if not word.startswith((_RESUME, "hydra.run.dir="))]
    return (
        [word for word in earlier if not word.startswith(_RESUME)] + now + [f"{_RESUME}{run}", f"hydra.run.dir={run}"]
    )


def record_settings(config: DictConfig) -> None:
    """Write the job's configuration and overrides to its folder, in the files in which Hydra writes them.

    Hydra writes them before the job starts. A job that is refused, since it would resume a run with other settings,
    would then have replaced those of the run.
    """
    hydra = HydraConfig.instance().cfg
    assert hydra is not None
    folder = recorded_settings()
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"config": config, "hydra": hydra, "overrides": HydraConfig.get().overrides.task}
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
