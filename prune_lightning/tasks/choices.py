"""The options of the shipped configuration, without composing it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml


def config_folder() -> Path:
    """Return the folder of the shipped configuration."""
    return Path(str(resources.files("prune_lightning.configs").joinpath("train.yaml"))).parent


def options_of(group: str) -> list[str]:
    """Return the options of a group of the configuration, such as the methods."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def model_name(path: str) -> str:
    """Return the name of the option whose model lies at a path; the path, if there is none."""
    option, located = preset_for(path)
    return located.get("path", option)


def preset_for(path: str) -> tuple[str, dict[str, str]]:
    """Return the option of the group ``model`` for a model, and the settings that it needs besides.

    The name of an option stands for its model. A path or hub name that belongs to an option is that option; any other
    is the option ``auto`` with this path.

    Args:
        path: Name of an option, folder, file or hub name.
    """
    names = options_of("model")
    if path in names:
        return path, {}
    for name in names:
        if (yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text("utf-8")) or {}).get("path") == path:
            return name, {}
    return "auto", {"path": path}
