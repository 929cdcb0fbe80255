"""Which runs may be averaged: those whose configurations differ in the seed alone."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from prune_lightning.errors import UserError

# Settings that change no score: file locations, display, batch sizes of computations.
_WITHOUT_EFFECT = {
    *("seed", "task", "control", "ledger", "resume", "bisect_collapse", "progress", "logger"),
    *("export", "export_merged", "model.control", "model.edit.sources"),
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"),
    *("callbacks.spectrum", "evaluation.max_case_mb", "evaluation.answers", "all_scores"),
}
_WITHOUT_EFFECT_ANYWHERE = {"cache", "shipped", "save_every", "token_budget"}
_CHOICES = ("model", "data")  # summary entries that each stand for many settings
_LOADED = {"path", "dtype", "gpu_dtype", "revision", "family"}  # of `model`; all else there is read by `${model.KEY}`

_Key: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Args:
        method: Editing method, with the settings that distinguish it from other groups of the same method.
        restraint: Restraint, with its settings where groups of the same restraint differ.
        runs: Their summaries.
    """

    method: str
    restraint: str
    runs: tuple[Mapping[str, Any], ...]

    def at(self, key: str, num_requests: int) -> float:
        """Return the mean of a score over the runs at an evaluated edit count; NaN where it was not evaluated."""
        values = self._values(key, num_requests)
        return float(np.mean(values)) if values else float("nan")

    def range(self, key: str, num_requests: int) -> tuple[float, float]:
        """Return the lowest and the highest of a score over the runs at an evaluated edit count."""
        values = self._values(key, num_requests)
        return min(values), max(values)

    def _values(self, key: str, num_requests: int) -> list[float]:
        found = [e.get(key) for run in self.runs for e in run["curve"] if e["num_requests"] == num_requests]
        return [np.nan if value is None else float(value) for value in found]

    def seconds_per_edit(self) -> float:
        """Return the mean time of an edit in seconds, without evaluation; NaN if a run does not say."""
        times = [run.get("edit_s", np.nan) / max(1, run.get("num_requests") or 1) for run in self.runs]
        return float(np.mean(times))

    @property
    def counts(self) -> list[int]:
        """The evaluated edit counts."""
        return [entry["num_requests"] for entry in self.runs[0]["curve"]]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Args:
        folder: Its folder.
        summary: Its ``summary.json``.
        config: Its configuration, not resolved; ``None`` if the folder has none.
    """

    folder: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Run:
    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, str]

    def part(self, restraint: bool) -> dict[str, str]:
        """Return the settings of the restraint, or all others."""
        return {key: value for key, value in self.settings.items() if key.startswith("restraint.") == restraint}


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Read run folders and group the runs whose configurations differ in the seed alone.

    Two configurations are the same if their ``.hydra/config.yaml`` are equal, except for the seed, for settings that
    change no score (file locations, display, batch sizes of computations), and for entries of the model's YAML that
    nothing in the run refers to, such as the layers of another method. Groups of the same method or restraint are
    labelled with the settings that distinguish them, e.g. ``prune (base=10)``. The label names model and data where the
    runs differ in them. If a run has no configuration file, all runs are compared by the model, data and restraint in
    their summaries.

    Raises:
        UserError: No run is finished, or two runs have the same configuration and the same seed.
    """
    runs = _read(folders)
    groups: dict[tuple[str, str, _Key], list[_Run]] = defaultdict(list)
    for run in runs:
        groups[run.summary["method"], run.summary["restraint"], _key(run.settings)].append(run)
    for members in groups.values():
        _check_seeds(members)
    firsts = [members[0] for members in groups.values()]
    methods = _labels(firsts, "method", lambda run: run.part(restraint=False))
    restraints = _labels(firsts, "restraint", lambda run: run.part(restraint=True))
    return [
        Group(method, restraint, tuple(run.summary for run in members))
        for method, restraint, members in zip(methods, restraints, groups.values(), strict=True)
    ]


def read_finished(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read the summary and the configuration of each run; unfinished ones are left out with a message.

    Raises:
        UserError: No run is finished.
    """
    unfinished = [str(folder) for folder in folders if not (folder / "summary.json").is_file()]
    folders = [folder for folder in folders if str(folder) not in unfinished]
    if not folders:
        raise UserError(f"{unfinished[0]!r} is not the folder of a finished run: it has no summary.json")
    if unfinished:
        sys.stderr.write(f"left out, since they are not finished: {', '.join(unfinished)}\n")
    found = []
    for folder in folders:
        path, config = folder / "summary.json", folder / ".hydra" / "config.yaml"
        summary = json.loads(path.read_text("utf-8"))
        # Not resolved: a seed that follows the run's, as `${seed}`, is the same text in all runs.
        found.append(
            FinishedRun(folder, summary, yaml.safe_load(config.read_text("utf-8")) if config.is_file() else None)
        )
    return found


def _read(folders: Sequence[Path]) -> list[_Run]:
    runs = read_finished(folders)
    configs: list[Any] = [run.config for run in runs]
    if missing := [str(run.folder) for run in runs if run.config is None]:
        sys.stderr.write(f"no .hydra/config.yaml in {missing[0]}: runs are compared by their summaries only\n")
        options = {"model": "model", "data": "data", "protocol": "protocol", "restraint": "restraint_options"}
        configs = [{key: run.summary.get(entry) for key, entry in options.items()} for run in runs]
    settings = [_settings(_without_unread(config)) for config in configs]
    return [_Run(run.folder, run.summary, each) for run, each in zip(runs, settings, strict=True)]


def _without_unread(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration without the entries of the model's YAML that nothing refers to."""
    model = config.get("model")
    if not isinstance(model, dict):
        return config
    named = set(re.findall(r"\bmodel\.([\w.]+)", json.dumps(config)))

    def read(node: Any, key: str) -> Any:
        if key in named or key in _LOADED:
            return node
        return {name: read(entry, f"{key}.{name}") for name, entry in node.items()} if isinstance(node, dict) else None

    return {**config, "model": {name: read(entry, name) for name, entry in model.items()}}


def _settings(config: Any, prefix: str = "") -> dict[str, str]:
    """Return the settings that change scores, by dotted name, as JSON."""
    if prefix in _WITHOUT_EFFECT or prefix.rpartition(".")[2] in _WITHOUT_EFFECT_ANYWHERE or config is None:
        return {}
    if not isinstance(config, dict):
        return {prefix: config if isinstance(config, str) else json.dumps(config)}
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= _settings(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _check_seeds(members: Sequence[_Run]) -> None:
    seen: dict[Any, Path] = {}
    for run in members:
        seed = run.summary.get("seed")
        if seed in seen:
            raise UserError(
                f"{str(seen[seed])!r} and {str(run.folder)!r} have the same configuration and the same seed ({seed}); "
                "pass only one of them"
            )
        seen[seed] = run.folder


def _labels(runs: Sequence[_Run], what: str, settings: Callable[[_Run], Mapping[str, str]]) -> list[str]:
    """Return a label per run: its method or restraint, and the settings that distinguish it from its namesakes."""
    by_name: dict[str, dict[_Key, _Run]] = defaultdict(dict)
    for run in runs:
        by_name[run.summary[what]].setdefault(_key(settings(run)), run)
    choices = _CHOICES if what == "method" else ()
    everywhere = [key for key in choices if len({run.summary.get(key) for run in runs}) > 1]

    def named(run: _Run) -> dict[str, str]:
        return {key: str(run.summary.get(key)) for key in choices} | dict(settings(run))

    labels = []
    for run in runs:
        name = run.summary[what]
        keys = _telling([named(other) for other in by_name[name].values()], everywhere)
        shown = [f"{key.removeprefix(f'{what}.')}={named(run).get(key, 'null')}" for key in keys]
        labels.append(f"{name} ({', '.join(shown)})" if shown else name)
    return labels


def _key(settings: Mapping[str, str]) -> _Key:
    return tuple(sorted(settings.items()))


def _telling(different: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """Return ``keys`` and as many further keys as it takes to distinguish all entries."""

    def apart(by: Sequence[str]) -> int:
        return len({tuple(each.get(key) for key in by) for each in different})

    chosen = list(keys)
    for key in dict.fromkeys(key for each in different for key in each):
        if apart([*chosen, key]) > apart(chosen):
            chosen.append(key)
    return chosen
