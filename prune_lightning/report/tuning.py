"""The picture of a search for hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def plot_tuning(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the score by trial, and by the value of each setting.

    Args:
        trials: Per trial ``score``, ``state`` (``complete`` or ``pruned``), and ``values`` by setting. Layers are shown
            by the last one.
    """
    keys = list(trials[0]["values"])
    columns = min(len(keys) + 1, 3)
    rows = -(-(len(keys) + 1) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    every = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axes in every[len(keys) + 1 :]:
        axes.set_axis_off()
    scores = [trial["score"] for trial in trials]
    whole = [trial["state"] == "complete" for trial in trials]
    best = np.maximum.accumulate([s if w else -np.inf for s, w in zip(scores, whole, strict=True)])
    every[0].step(range(len(trials)), best, "C2-", where="post", label="best so far")
    _points(every[0], list(range(len(trials))), scores, whole)
    every[0].set(xlabel="trial", ylabel="score")
    every[0].legend(fontsize=8)
    for axes, key in zip(every[1:], keys, strict=False):
        values = [_shown(trial["values"][key]) for trial in trials]
        _points(axes, values, scores, whole)
        axes.set(xlabel=key, ylabel="score")
        numbers = [value for value in values if isinstance(value, float | int) and value > 0]
        if len(numbers) == len(values) and max(numbers) > 5 * min(numbers):
            axes.set_xscale("log")
    figure.suptitle("Search for hyper-parameters; the first trial has the defaults")
    return figure


def _shown(value: Any) -> Any:
    return value[-1] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _points(axes: Any, values: Sequence[Any], scores: Sequence[float], whole: Sequence[bool]) -> None:
    for done, style, label in ((True, "C0o", "all edits"), (False, "C7x", "stopped early")):
        chosen = [i for i, finished in enumerate(whole) if finished is done]
        axes.plot([values[i] for i in chosen], [scores[i] for i in chosen], style, ms=5, label=label)
    axes.plot(values[:1], scores[:1], "C3D", ms=6, label="defaults")
    axes.grid(alpha=0.3)
