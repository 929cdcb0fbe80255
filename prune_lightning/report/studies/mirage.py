"""The study "The Mirage of Model Editing" (Yang et al., 2025): teacher forcing against generated answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prune_lightning.report.groups import FinishedRun, Group
from prune_lightning.report.studies.page import Cell, markdown
from prune_lightning.report.studies.runs import by, last

_FORCED = {"reliability": "rewrite_acc", "generalization": "rephrase_acc", "locality": "locality_acc"}
_WILD = {
    "reliability": "{}_efficacy_exact_match",
    "generalization": "{}_generalization_exact_match",
    "locality": "{}_locality",
}
_TITLES = {"single": "each edit on the unedited model", "sequential": "one edit after another"}
_Key = tuple[str, str, str]


def mirage(runs: Sequence[FinishedRun]) -> tuple[str, Figure]:
    """Return each editor's scores under teacher forcing and in generated answers, and the drop between them.

    A row per data set and protocol, a column per score; a bar under teacher forcing and one per form of the question.
    """
    groups = by(runs, lambda run: (str(run.summary["data"]), str(run.summary["protocol"]), str(run.summary["method"])))
    contexts = _contexts(list(groups.values()))
    settings = sorted(
        {(data, protocol) for data, protocol, _ in groups}, key=lambda pair: (pair[0], pair[1] != "single")
    )
    drawing = Figure(figsize=(4.2 * len(_FORCED), 2.7 * len(settings)), layout="constrained")
    grid = drawing.subplots(len(settings), len(_FORCED), squeeze=False, sharey=True)
    for row, (data, protocol) in zip(grid, settings, strict=True):
        of = {method: group for (d, p, method), group in groups.items() if (d, p) == (data, protocol)}
        for axes, score in zip(row, _FORCED, strict=True):
            _bars(axes, of, score, contexts)
            axes.set_title(f"{score}, {_TITLES.get(protocol, protocol)}", fontsize=10)
        row[0].set_ylabel(f"{data}")
    handles, names = grid[0][0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return _table(groups, settings, contexts), drawing


def _contexts(groups: Sequence[Group]) -> list[str]:
    final = groups[0].runs[0]["final"]
    return [name for name in ("bare", "instruction", "chat") if f"edit/wild/{name}_locality" in final]


def _scores(group: Group, score: str, contexts: Sequence[str]) -> list[float]:
    keys = [f"edit/easyedit/{_FORCED[score]}", *(f"edit/wild/{_WILD[score].format(name)}" for name in contexts)]
    return [last(group, key) for key in keys]


def _bars(axes: Axes, groups: dict[str, Group], score: str, contexts: Sequence[str]) -> None:
    names = ["teacher forcing", *(f"generated, {context}" for context in contexts)]
    values = np.array([_scores(group, score, contexts) for group in groups.values()])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = np.arange(len(groups)) + (number - (len(names) - 1) / 2) * width
        bars = axes.bar(
            at, values[:, number], width * 0.95, color="0.7" if number == 0 else f"C{number - 1}", label=name
        )
        axes.bar_label(bars, labels=[f"{value:.2f}" for value in values[:, number]], fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.12)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _table(groups: dict[_Key, Group], settings: Sequence[tuple[str, str]], contexts: Sequence[str]) -> str:
    first = next(iter(groups.values()))
    heads = ["data", "protocol", "editor", *(f"{score}, {name}" for score in _FORCED for name in ("forced", *contexts))]
    heads.append("drop of reliability")
    rows: list[list[Cell]] = []
    for pair in settings:
        for (data, protocol, method), group in groups.items():
            if (data, protocol) == pair:
                values = {score: _scores(group, score, contexts) for score in _FORCED}
                forced, *wild = values["reliability"]
                rows.append(
                    [data, protocol, method, *(v for score in values.values() for v in score), forced - max(wild)]
                )
    text = f"{first.runs[0]['model']}, {first.counts[-1]} edits:\n\n{markdown(heads, rows)}"
    return text + "\n\nThe drop is from teacher forcing to the better of the generated answers."
