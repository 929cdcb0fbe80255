"""The runs of a study, grouped by the settings that it varies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from prune_lightning.errors import UserError
from prune_lightning.report.groups import FinishedRun, Group, read_finished

K = TypeVar("K", bound=Hashable)


def read_study(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read the run folders directly inside some folders, by name.

    Raises:
        UserError: There is none, or none is finished.
    """
    found = sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir())
    if not found:
        raise UserError(f"{', '.join(map(str, folders))} holds no run folder")
    return read_finished(found)


def option(run: FinishedRun, key: str) -> Any:
    """Return a setting of a run by its dotted name; ``None`` if it has none."""
    value = OmegaConf.select(OmegaConf.create(dict(run.config or {})), key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def by(runs: Sequence[FinishedRun], key: Callable[[FinishedRun], K]) -> dict[K, Group]:
    """Group runs by a key, in the order of the keys; runs of a group differ in their seeds."""
    members: dict[K, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        members[key(run)].append(run)
    return {
        name: Group(group[0].summary["method"], group[0].summary["restraint"], tuple(run.summary for run in group))
        for name, group in sorted(members.items(), key=lambda item: str(item[0]))
    }


def last(group: Group, key: str) -> float:
    """Return a score at the end of the runs."""
    return group.at(key, group.counts[-1])


def tasks(groups: Sequence[Group]) -> list[str]:
    """Return the keys of the tasks that retention is computed from in all runs."""
    found = [
        [f"{name}/{task}" for name, facts in run.get("retention", {}).items() for task in facts["tasks"]]
        for group in groups
        for run in group.runs
    ]
    return [key for key in found[0] if all(key in each for each in found)]
