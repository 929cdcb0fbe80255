"""Compare run folders: `python -m prune_lightning.report.compare RUN... --out FOLDER`.

Runs whose configurations differ in the seed alone are averaged; see :mod:`prune_lightning.report.groups`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prune_lightning.errors import UserError
from prune_lightning.metrics.trajectory import kaplan_meier_median
from prune_lightning.report.groups import Group, read_groups
from prune_lightning.report.labels import Labels
from prune_lightning.report.table import figure
from prune_lightning.report.trajectories import ability_trajectories

HALF = 0.5
KEPT = "ability/miniature/retention"
WRITTEN = "edit/counterfact/efficacy_score"

_SIDE_BY_SIDE = 5
_LEGEND = 2.0  # inches that an entry of the legend needs


@dataclass(frozen=True)
class Keys:
    """The two scores that runs are compared by.

    Args:
        kept: Retention: the abilities relative to the unedited model.
        written: Success of the edits so far.
    """

    kept: str
    written: str

    @classmethod
    def common(cls, groups: Sequence[Group]) -> Keys:
        """Return scores that all runs have: the bundled miniature's and CounterFact's if possible.

        A retention that no task counts for in one of the runs is not one that all have.

        Where the runs have none in common, these two are returned, and the table has no values for them.
        """
        finals = [run["curve"][-1] for group in groups for run in group.runs]
        shared = [key for key in finals[0] if all(key in final for final in finals)]
        known = [key for key in shared if all(final[key] is not None for final in finals)]
        kept = [key for key in known if key.endswith("/retention") and key.startswith("ability/")]
        written = [key for key in shared if key.startswith("edit/") and _about_edits(key.rpartition("/")[2])]
        written += [key for key in shared if key.startswith("stream/") and key.endswith("/final")]
        return cls(
            KEPT if KEPT in kept or not kept else kept[0],
            WRITTEN if WRITTEN in written or not written else written[0],
        )

    def remark(self) -> str:
        """Return the line below the table that names the scores compared; empty for the default ones."""
        chosen = {"retention": (self.kept, KEPT), "efficacy at N": (self.written, WRITTEN)}
        lines = [f"{name} is `{key}`" for name, (key, default) in chosen.items() if key != default]
        return "\n\n" + ", ".join(lines) + "." if lines else ""


def _about_edits(score: str) -> bool:
    return "efficacy" in score or score.startswith("rewrite")


def labels_of(groups: Sequence[Group]) -> Labels:
    """Return the names of all scores of all runs, as their summaries give them."""
    found: dict[str, Any] = {}
    for group in groups:
        for run in group.runs:
            found |= run.get("labels", {})
    return Labels(found)


def half_lost(group: Group, kept: str) -> int | None:
    """Return the first evaluated edit count at which half of the abilities are lost; ``None`` if they never are."""
    return next((count for count in group.counts if group.at(kept, count) <= HALF), None)


def collapses(group: Group, kept: str) -> tuple[list[float], list[bool]]:
    """Return for each run its edits to collapse, or its last count, and whether it collapsed at all."""
    found = [
        ability_trajectories(run["curve"], {kept: 0.0}).get(kept, {}).get("edits_to_collapse") for run in group.runs
    ]
    reached = [count is not None and math.isfinite(count) for count in found]
    lasts = [run["curve"][-1]["num_requests"] for run in group.runs]
    return [float(c) if c and r else float(t) for c, r, t in zip(found, reached, lasts, strict=True)], reached


_COLUMNS = {
    "efficacy, success": "edit/counterfact/efficacy_score",
    "efficacy, exact match": "edit/counterfact/efficacy_accuracy",
    "generalization, success": "edit/counterfact/generalization_score",
    "locality, exact match": "edit/counterfact/locality_accuracy",
}
_KL = "drift/kl"
_FURTHER = {
    "locality, agreement": "stream/locality_agreement",
    "drift, nats per token": _KL,
    "change seen by the text": "drift/change",
    "largest condition number": "spectrum/condition_number",
}


def markdown_table(groups: Sequence[Group], keys: Keys) -> str:
    """Return a row per group: scores at N and at the end.

    N is the first evaluated edit count at which the method without a restraint has lost half of its abilities. There
    are no columns of N where none has.
    """
    halves = {group.method: half_lost(group, keys.kept) for group in groups if group.restraint == "none"}
    last = min(group.counts[-1] for group in groups)
    further = {head: key for head, key in _FURTHER.items() if any(not math.isnan(g.at(key, last)) for g in groups)}
    columns = {f"retention, {last} edits": keys.kept, **_COLUMNS, **further}
    lost = ["N", "retention at N", "efficacy at N"] if any(halves.values()) else []
    heads = ["method", "restraint", *lost, *columns, "s per edit"]
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for group in groups:
        cells = [group.method, group.restraint]
        if lost:
            half = halves.get(group.method)
            at_half = [group.at(key, half) if half else None for key in (keys.kept, keys.written)]
            cells += [str(half or "–"), *map(figure, at_half)]
        cells += [figure(group.at(key, last)) for key in columns.values()]
        cells.append(f"{group.seconds_per_edit():.2f}".replace("nan", "–"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + keys.remark() + _left_out(groups, keys)


def _left_out(groups: Sequence[Group], keys: Keys) -> str:
    """Return the line that names the tasks which the retention of a run leaves out; empty if there are none."""
    name = keys.kept.removesuffix("/retention")
    found = [run.get("retention", {}).get(name, {}).get("left_out", {}) for group in groups for run in group.runs]
    tasks = sorted({task for left_out in found for task in left_out})
    everywhere = [task for task in tasks if all(task in left_out for left_out in found)]
    named = [task if task in everywhere else f"{task} (in some runs)" for task in tasks]
    text = "not clearly above chance before the first edit and left out of the retention"
    return f"\n\n{', '.join(named)}: {text}." if named else ""


def plot_compare(groups: Sequence[Group], keys: Keys) -> Figure:
    """Draw retention, efficacy and, where all runs have it, drift against the number of edits; bands over seeds.

    One column per method, five at most side by side. The scores of a single method are drawn side by side.
    """
    methods = list(dict.fromkeys(group.method for group in groups))
    restraints = list(dict.fromkeys(group.restraint for group in groups))
    rows = {"retention": keys.kept, labels_of(groups).label(keys.written): keys.written}
    if all(not math.isnan(group.at(_KL, group.counts[-1])) for group in groups):
        rows["drift (nats per token)"] = _KL
    bands = math.ceil(len(methods) / _SIDE_BY_SIDE)
    columns = math.ceil(len(methods) / bands)
    width, height = (4.2, 3.2) if bands == 1 else (2.8, 2.2)
    shape = (len(rows) * bands, columns) if len(methods) > 1 else (1, len(rows))
    size = (width * shape[1], height * shape[0])
    drawing = Figure(figsize=size, layout="constrained")
    shared: Any = "row" if len(methods) > 1 else False
    grid = drawing.subplots(*shape, sharex=True, sharey=shared, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    drifts = []
    for number, method in enumerate(methods):
        band, column = divmod(number, columns)
        column_of_axes = grid[band * len(rows) : (band + 1) * len(rows), column] if len(methods) > 1 else grid[0]
        for axes, (name, key) in zip(column_of_axes, rows.items(), strict=True):
            axes.set_axis_on()
            axes.grid(alpha=0.3)
            for group in groups:
                if group.method == method:
                    _draw_group(axes, group, key, keys, f"C{restraints.index(group.restraint)}")
            if key == _KL:
                drifts.append(axes)
            else:
                axes.set_ylim(-0.03, 1.05)
            if column == 0:
                axes.set_ylabel(name if bands == 1 else name.split(" (")[0])
        column_of_axes[0].set_title(method.replace(" (", "\n("), fontsize=10)
        for axes in column_of_axes if len(methods) == 1 else column_of_axes[-1:]:
            axes.set_xlabel("edits")
            axes.tick_params(labelbottom=True)  # also where a further band of methods follows
    for axes in drifts:  # once all curves are drawn, since the axes of a row share their limits
        axes.set_ylim(bottom=0)
    handles = {name: handle for axes in grid[0] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    beside = min(len(restraints), int(size[0] / _LEGEND))
    drawing.legend(handles.values(), handles, loc="outside lower center", ncols=beside, frameon=False)
    return drawing


def _draw_group(axes: Any, group: Group, key: str, keys: Keys, color: str) -> None:
    counts = group.counts[1 if key == keys.written else 0 :]
    counts = [count for count in counts if not math.isnan(group.at(key, count))]
    alone = group.restraint == "none"
    style, color = ("--", "black") if alone else ("-", color)
    axes.plot(counts, [group.at(key, c) for c in counts], style, color=color, label=group.restraint, marker=".")
    if len(group.runs) > 1 and counts:
        low, high = zip(*(group.range(key, count) for count in counts), strict=True)
        axes.fill_between(counts, low, high, color=color, alpha=0.15, lw=0)


def plot_collapse(groups: Sequence[Group], keys: Keys) -> Figure:
    """Draw the edits to collapse: the median over seeds.

    The bar is hatched, and ends at the last count, where at most half of the runs collapse.
    """
    drawing = Figure(figsize=(7.5, 1.2 + 0.38 * len(groups)), layout="constrained")
    axes = drawing.subplots()
    for place, group in enumerate(groups):
        times, observed = collapses(group, keys.kept)
        median = kaplan_meier_median(times, observed)
        length = max(times) if median is None else median
        never = median is None
        axes.barh(place, length, 0.65, color="white" if never else "C0", edgecolor="0.5", hatch="///" if never else "")
        axes.plot(times, [place] * len(times), "k.", ms=4)
        axes.text(length, place, f"  > {length:.0f}" if median is None else f"  {length:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [f"{group.method}, {group.restraint}" for group in groups])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    score = labels_of(groups).label(keys.kept)
    axes.set(xlabel=f"edits to collapse: {score} at or below {HALF} at two evaluated counts in a row")
    return drawing


def plot_forgetting(groups: Sequence[Group], keys: Keys) -> Figure:
    """Draw the immediate success of each edit and the success of all edits so far, against the number of edits."""
    forms = {"accuracy": "exact match of the new answer", "score": "success: new answer likelier than the old one"}
    drawing = Figure(figsize=(11, 4.4), layout="constrained")
    all_axes = drawing.subplots(1, 2, sharey=True)
    for axes, (form, title) in zip(all_axes, forms.items(), strict=True):
        for number, group in enumerate(groups):
            name = group.method if group.restraint == "none" else f"{group.method}, {group.restraint}"
            for key, style in (("acquisition", "--"), ("final", "o-")):
                curve = [group.at(f"stream/{form}/{key}", count) for count in group.counts[1:]]
                axes.plot(
                    group.counts[1:], curve, style, color=f"C{number}", ms=4, label=name if key == "final" else None
                )
        axes.set(ylim=(-0.03, 1.03), xlabel="edits", title=title)
        axes.grid(alpha=0.3)
    all_axes[0].plot([], [], "--", color="grey", label="right after each edit")
    all_axes[0].plot([], [], "o-", color="grey", ms=4, label="all edits so far")
    handles, names = all_axes[0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False)
    return drawing


FIGURES = {"compare": plot_compare, "collapse": plot_collapse, "forgetting": plot_forgetting}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the figures that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m prune_lightning.report.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for compare.md and the figures")
    parser.add_argument(
        "--figures",
        nargs="+",
        choices=list(FIGURES),
        default=["compare"],
        help="compare: table and curves by method; collapse: edits to collapse; forgetting: success over time",
    )
    options = parser.parse_args(arguments)
    try:
        groups = read_groups(options.runs)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    keys = Keys.common(groups)
    table = markdown_table(groups, keys)
    if "compare" in options.figures:
        (options.out / "compare.md").write_text(table + "\n", "utf-8")
    for name in options.figures:
        FIGURES[name](groups, keys).savefig(options.out / f"{name}.png", dpi=90)
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
