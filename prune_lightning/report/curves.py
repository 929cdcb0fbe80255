"""Plots of scores against the number of edits, for any measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prune_lightning.report.labels import Labels
from prune_lightning.report.trajectories import Curve, points

_COLUMNS = 3
_DRIFT = "drift/"  # tiny at first, so each of its scores has an axis of its own
_FORMS = {"score": "success", "accuracy": "exact match", "magnitude": "probability difference"}
Panels = dict[str, list[str]]


def _keys(curves: Mapping[str, Curve], prefix: str) -> list[str]:
    found = dict.fromkeys(key for curve in curves.values() for entry in curve for key in entry)
    return [key for key in found if key.startswith(prefix) and not key.rpartition("/")[2].startswith("num_")]


def _shares(curves: Mapping[str, Curve], key: str) -> bool:
    """Whether a score lies between -1 and 1 throughout."""
    values = np.concatenate([points(curve, key)[1] for curve in curves.values()])
    return bool(np.nanmax(np.abs(values), initial=0.0) <= 1.0 + 1e-9)


def _ability_panels(curves: Mapping[str, Curve], labels: Labels) -> Panels:
    """Return a panel for the shares of each measurement, and one for each figure of another size."""
    panels: Panels = {}
    drifts = [key for key in _keys(curves, _DRIFT) if "change/" not in key]  # the largest change stands for all
    for key in [*_keys(curves, "ability/"), *drifts]:
        together = _shares(curves, key) and not key.startswith(_DRIFT)
        title = labels.title(key) if together else f"{labels.title(key)}: {labels.label(key)}"
        panels.setdefault(title, []).append(key)
    return panels


def _editing_panels(curves: Mapping[str, Curve], labels: Labels) -> Panels:
    """Return a panel for each measurement and form: the last word of a score's name, if there are several words."""
    panels: Panels = {}
    for key in _keys(curves, "edit/"):
        form = key.rpartition("/")[2].rpartition("_")
        title = f"{labels.title(key)}: {_FORMS.get(form[2], form[2])}" if form[0] else labels.title(key)
        panels.setdefault(title, []).append(key)
    return panels


def _band(axes: Axes, intervals: Curve, key: str, color: str) -> None:
    taken = [(entry["num_requests"], *entry[key]) for entry in intervals if key in entry]
    if len(taken) > 1:
        counts, low, high = zip(*taken, strict=True)
        axes.fill_between(counts, low, high, color=color, alpha=0.12, lw=0)


def edit_axis(axes: Axes, counts: Sequence[int]) -> None:
    """Put edit counts on a nearly logarithmic x-axis, on which the first edits can be told apart."""
    axes.set_xscale("symlog", linthresh=1)
    shown: list[int] = []
    for count in sorted(set(counts), reverse=True):  # the last one is always shown
        if not shown or np.log2((shown[-1] + 1) / (count + 1)) > 0.5:
            shown.append(count)
    axes.set_xticks(shown, [str(count) for count in shown])
    axes.minorticks_off()
    axes.set_xlabel("edits")
    axes.grid(alpha=0.3)


def _draw(curves: Mapping[str, Curve], intervals: Mapping[str, Curve], panels: Panels, labels: Labels) -> Figure:
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 4.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    counts = [entry["num_requests"] for curve in curves.values() for entry in curve]
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, keys) in zip(grid, panels.items(), strict=False):
        for number, key in enumerate(keys):
            kept = key.endswith("/retention")
            color = "black" if kept else f"C{number % 10}"
            for (name, curve), style in zip(curves.items(), ("o-", "x--"), strict=False):
                x, y = points(curve, key)
                text = f"{labels.label(key)}, {name}" if len(curves) > 1 else labels.label(key)
                axes.plot(x, y, style, color=color, lw=2.2 if kept else 1.3, ms=4, label=text)
                _band(axes, intervals.get(name, ()), key, color)
        edit_axis(axes, counts)
        axes.set_title(title, fontsize=10)
        if all(_shares(curves, key) and not key.startswith(_DRIFT) for key in keys):
            low = min((min(points(curve, key)[1], default=0) for curve in curves.values() for key in keys), default=0)
            axes.set_ylim(min(-0.03, low - 0.03), 1.03)
        axes.legend(fontsize=7, framealpha=0.6)
    return figure


def plot_abilities(
    curves: Mapping[str, Curve], intervals: Mapping[str, Curve] | None = None, labels: Labels | None = None
) -> Figure | None:
    """Draw abilities and drift, solid for the first curve and dashed for the second; bands show intervals.

    Args:
        curves: Scores at each evaluated count, by name.
        intervals: Low and high of scores at each evaluated count, by the same names.
        labels: Names of scores; their keys if not given.

    Returns:
        The figure, or ``None`` if neither was measured.
    """
    names = labels or Labels()
    panels = _ability_panels(curves, names)
    return _draw(curves, intervals or {}, panels, names) if panels else None


def plot_editing(
    curves: Mapping[str, Curve], intervals: Mapping[str, Curve] | None = None, labels: Labels | None = None
) -> Figure | None:
    """Draw the editing scores over the edits so far; arguments as in :func:`plot_abilities`."""
    names = labels or Labels()
    panels = _editing_panels(curves, names)
    return _draw(curves, intervals or {}, panels, names) if panels else None


def plot_retention(entries: Sequence[tuple[int, int, int, float]], title: str) -> Figure:
    """Draw the retention matrix: each edit (upwards, in the order of the stream) at each evaluated count.

    Args:
        entries: Count, commit, case and value of each entry; entries from before the commit are left out.
        title: What the value is.
    """
    after = [entry for entry in entries if entry[0] >= entry[1]]
    later = sorted({t for t, commit, _, _ in after if t > commit})
    cases = sorted({case for _, _, case, _ in after})
    grid = np.full((len(cases), 1 + len(later)), np.nan)
    row = {case: i for i, case in enumerate(cases)}
    for t, commit, case, value in after:
        grid[row[case], 0 if t == commit else 1 + later.index(t)] = value
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.88")
    image = axes.imshow(
        grid, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="RdYlBu", interpolation="nearest",
        extent=(-0.5, len(later) + 0.5, 0.5, len(cases) + 0.5),
    )  # fmt: skip
    axes.axvline(0.5, color="black", lw=1)
    axes.set_xticks(range(1 + len(later)), ["right after", *map(str, later)], rotation=60)
    axes.set(xlabel="edits so far", ylabel="edit, in the order of the stream", title=title)
    figure.colorbar(image, label="1: edit holds, 0: edit is lost, grey: not scored")
    return figure


def plot_immediate(
    curves: Mapping[str, Curve], stream: Mapping[str, Any], title: str = "", labels: Labels | None = None
) -> Figure | None:
    """Draw the immediate success of edits, the later success of all of them, and retention by age.

    Args:
        curves: One curve, by name.
        stream: By form, ``by_age`` of its retention.
        title: What was edited.
        labels: Names of scores; their keys if not given.

    Returns:
        The figure, or ``None`` where no metrics over the stream were taken.
    """
    if not stream:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve, names = next(iter(curves.values())), labels or Labels()
    for number, form in enumerate(stream):
        for key, style in (("acquisition", "--"), ("final", "o-")):
            counts, values = points(curve, f"stream/{form}/{key}")
            left.plot(
                counts,
                values,
                style,
                color=f"C{number}",
                ms=4,
                label=names.label(f"stream/{form}/{key}"),
            )
        bins = stream[form]["by_age"]
        ages = [row["age"] for row in bins]
        for key, style in (("retention", "o-"), ("conditional", "x:")):
            text = "retention" if key == "retention" else "retention of edits that held at first"
            name = f"{text}, {_FORMS[form]}"
            right.plot(ages, [row[key] for row in bins], style, color=f"C{number}", ms=4, label=name)
    edit_axis(left, [entry["num_requests"] for entry in curve if entry["num_requests"]])
    edit_axis(right, [round(row["age"]) for form in stream.values() for row in form["by_age"]])
    right.set_xlabel("age: number of later edits")
    for axes, name in ((left, "success right after the edit, and of all edits so far"), (right, "retention by age")):
        axes.set(ylim=(-0.03, 1.03), title=name)
        axes.legend(fontsize=7, framealpha=0.6)
    figure.suptitle(title, fontsize=10)
    return figure
