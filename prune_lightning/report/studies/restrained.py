"""The studies of a restraint: PRUNE's figure and RECT's table."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from prune_lightning.report.compare import Keys, labels_of
from prune_lightning.report.groups import FinishedRun, Group
from prune_lightning.report.studies.page import Cell, markdown
from prune_lightning.report.studies.runs import by, last, option, tasks

_CONDITION, _NORM, _CHANGE = "spectrum/condition_number", "spectrum/norm_ratio", "spectrum/relative_change"
_SMALLEST = 1e-4  # of an axis of relative changes
_WIDE = 10  # ratio of relative changes from which on an axis is logarithmic


def prune(runs: Sequence[FinishedRun]) -> tuple[str, Figure]:
    """Return condition number, norm and abilities against the edits, of each editor alone and with PRUNE.

    A row per editor, a column per figure, and a line per base of the logarithm.
    """
    groups = by(runs, lambda run: (str(run.summary["method"]), option(run, "restraint.base") or 0.0))
    keys, labels = Keys.common(list(groups.values())), labels_of(list(groups.values()))
    methods = list(dict.fromkeys(method for method, _ in groups))
    columns = [_CONDITION, _NORM, *tasks(list(groups.values()))]
    drawing = Figure(figsize=(2.9 * len(columns), 2.5 * len(methods)), layout="constrained")
    grid = drawing.subplots(len(methods), len(columns), squeeze=False, sharex=True)
    bases = sorted({base for _, base in groups if base})
    for (method, base), group in groups.items():
        style = {"color": f"C{bases.index(base)}"} if base else {"color": "black", "linestyle": "--"}
        for axes, key in zip(grid[methods.index(method)], columns, strict=True):
            values = [group.at(key, count) for count in group.counts]
            axes.plot(group.counts, values, marker=".", label=_restraint("PRUNE, base", base), **style)
    for row, method in zip(grid, methods, strict=True):
        row[0].set_ylabel(method)
        for axes, key in zip(row, columns, strict=True):
            axes.grid(alpha=0.3)
            if key in (_CONDITION, _NORM):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(LogFormatter())
                axes.yaxis.set_minor_formatter(LogFormatter())
            else:
                axes.set_ylim(-0.03, 1.05)
    for axes, key in zip(grid[0], columns, strict=True):
        axes.set_title("relative norm" if key == _NORM else labels.label(key), fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("edits")
    _legend(drawing, grid[0][0])
    heads = [
        "editor",
        "restraint",
        "condition number",
        "relative norm",
        *map(labels.label, columns[2:]),
        "retention",
        "efficacy",
    ]
    rows: list[list[Cell]] = [
        [method, _restraint("PRUNE, base", base), *(last(group, key) for key in [*columns, keys.kept, keys.written])]
        for (method, base), group in groups.items()
    ]
    return _headed(groups, markdown(heads, rows)) + keys.remark(), drawing


def rect(runs: Sequence[FinishedRun]) -> tuple[str, Figure]:
    """Return relative change, abilities and editing success of each editor by the share of entries that RECT keeps."""
    groups = by(runs, lambda run: (str(run.summary["method"]), float(option(run, "restraint.keep") or 1.0)))
    keys, labels = Keys.common(list(groups.values())), labels_of(list(groups.values()))
    methods = list(dict.fromkeys(method for method, _ in groups))
    drawing = Figure(figsize=(3.6 * len(methods), 5.6), layout="constrained")
    grid = drawing.subplots(2, len(methods), squeeze=False, sharey=True, sharex="col")
    for number, method in enumerate(methods):
        of = {keep: group for (name, keep), group in groups.items() if name == method}
        x = [max(last(group, _CHANGE), _SMALLEST) for group in of.values()]
        for axes, key, title in (
            (grid[0][number], keys.kept, "retention"),
            (grid[1][number], keys.written, "efficacy"),
        ):
            y = [last(group, key) for group in of.values()]
            axes.plot(x, y, "-", color="0.75", zorder=1)
            axes.scatter(x, y, c=["black" if keep == 1 else "C0" for keep in of], zorder=2)
            _name_points(axes, list(of), list(zip(x, y, strict=True)))
            axes.set(ylim=(-0.12, 1.12), ylabel="" if number else title)
            axes.set_xscale("log" if max(x) > _WIDE * min(x) else "linear")
            axes.margins(x=0.2)
            axes.grid(alpha=0.3)
        grid[0][number].set_title(method)
        grid[1][number].set_xlabel("relative change of the weights")
    names = tasks(list(groups.values()))
    heads = ["editor", "kept", "relative change", *map(labels.label, names), "retention", "efficacy"]
    rows: list[list[Cell]] = [
        [method, "alone" if keep == 1 else f"{keep:g}"]
        + [last(group, key) for key in [_CHANGE, *names, keys.kept, keys.written]]
        for (method, keep), group in groups.items()
    ]
    return _headed(groups, markdown(heads, rows)) + keys.remark(), drawing


def _name_points(axes: Axes, keeps: Sequence[float], places: Sequence[tuple[float, float]]) -> None:
    """Write the kept shares above their points and ``alone`` below, with one text where points coincide."""
    named: dict[tuple[float, float], list[float]] = {}
    for keep, place in zip(keeps, places, strict=True):
        named.setdefault(place, []).append(keep)
    for place, here in named.items():
        text = ", ".join("alone" if keep == 1 else f"{keep:g}" for keep in here)
        offset = (4, -11) if here == [1] else (4, 5)
        axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=8)


def _headed(groups: dict[tuple[str, float], Group], table: str) -> str:
    group = next(iter(groups.values()))
    run = group.runs[0]
    return f"{run['model']}, {run['data']}, after {group.counts[-1]} edits:\n\n{table}"


def _restraint(name: str, value: float) -> str:
    return f"{name} {value:g}" if value else "alone"


def _legend(drawing: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
