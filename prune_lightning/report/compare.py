"""Set run folders side by side: `python -m prune_lightning.report.compare RUN... --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prune_lightning.errors import UserError
from prune_lightning.report.table import figure

HALF = 0.5
KEPT = "ability/miniature/retention"
WRITTEN = "edit/counterfact/efficacy_score"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Args:
        method: Editing method.
        restraint: Restraint.
        runs: Their summaries.
    """

    method: str
    restraint: str
    runs: tuple[Mapping[str, Any], ...]

    def at(self, key: str, num_edits: int) -> float:
        """Return the mean of a score over the runs at an evaluated edit count; NaN where it was not evaluated."""
        values = [e.get(key) for run in self.runs for e in run["curve"] if e["num_edits"] == num_edits]
        return float(np.mean([np.nan if value is None else value for value in values])) if values else float("nan")

    @property
    def counts(self) -> list[int]:
        """The evaluated edit counts."""
        return [entry["num_edits"] for entry in self.runs[0]["curve"]]


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Read the summaries of run folders and group them by method and restraint.

    Raises:
        UserError: A folder holds no summary.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for folder in folders:
        path = folder / "summary.json"
        if not path.is_file():
            raise UserError(f"{str(folder)!r} is not the folder of a finished run: there is no summary.json in it")
        summary = json.loads(path.read_text("utf-8"))
        groups[summary["method"], summary["restraint"]].append(summary)
    return [Group(method, restraint, tuple(runs)) for (method, restraint), runs in groups.items()]


def half_life(group: Group) -> int | None:
    """Return the first evaluated edit count at which half of the abilities are lost; ``None`` if they never are."""
    for count in group.counts:
        if group.at(KEPT, count) <= HALF:
            return count
    return None


_COLUMNS = {
    "abilities kept": "ability/miniature/retention",
    "efficacy, preferred": "edit/counterfact/efficacy_score",
    "efficacy, said": "edit/counterfact/efficacy_accuracy",
    "generalization, preferred": "edit/counterfact/generalization_score",
    "locality, said": "edit/counterfact/locality_accuracy",
}


def markdown_table(groups: Sequence[Group]) -> str:
    """Return a row per group, at the edit count where its method has lost half without a restraint, and at the end."""
    halves = {group.method: half_life(group) for group in groups if group.restraint == "none"}
    last = min(group.counts[-1] for group in groups)
    heads = ["method", "restraint", "N", "kept at N", "efficacy at N"]
    heads += [f"{name}, {last} edits" if not i else name for i, name in enumerate(_COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for group in groups:
        half = halves.get(group.method)
        at_half = [group.at(key, half) if half else None for key in (KEPT, WRITTEN)]
        cells = [group.method, group.restraint, str(half or "–"), *map(figure, at_half)]
        cells += [figure(group.at(key, last)) for key in _COLUMNS.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(groups: Sequence[Group]) -> Figure:
    """Draw what is kept and what is written against the number of edits, one column per method."""
    methods = list(dict.fromkeys(group.method for group in groups))
    restraints = list(dict.fromkeys(group.restraint for group in groups))
    rows = {"abilities kept": KEPT, "efficacy (new answer preferred)": WRITTEN}
    drawing = Figure(figsize=(4.2 * len(methods), 3.2 * len(rows)), layout="constrained")
    grid = np.atleast_2d(drawing.subplots(len(rows), len(methods), sharex=True, sharey=True, squeeze=False))
    for group in groups:
        for row, key in enumerate(rows.values()):
            axes = grid[row, methods.index(group.method)]
            curve = [group.at(key, count) for count in group.counts]
            start = 1 if key.startswith("edit/") else 0
            style = "--" if group.restraint == "none" else "-"
            color = "black" if group.restraint == "none" else f"C{restraints.index(group.restraint)}"
            axes.plot(group.counts[start:], curve[start:], style, color=color, label=group.restraint, marker=".")
    for row, label in enumerate(rows):
        grid[row, 0].set_ylabel(label)
    for column, method in enumerate(methods):
        grid[0, column].set_title(method)
        grid[-1, column].set_xlabel("edits")
        for axes in grid[:, column]:
            axes.set_ylim(-0.03, 1.05)
            axes.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(restraints), frameon=False)
    return drawing


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write `compare.md` and `compare.png`."""
    parser = argparse.ArgumentParser(prog="python -m prune_lightning.report.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("."), help="where compare.md and compare.png go")
    options = parser.parse_args(arguments)
    try:
        groups = read_groups(options.runs)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(groups)
    (options.out / "compare.md").write_text(table + "\n", "utf-8")
    plot(groups).savefig(options.out / "compare.png", dpi=110)
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
