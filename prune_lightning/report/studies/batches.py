"""The study "Is Bigger Edit Batch Size Always Better?" (Yoon et al., 2024): batch sizes, batched and sequential."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prune_lightning.report.compare import Keys
from prune_lightning.report.groups import FinishedRun, Group
from prune_lightning.report.studies.page import Cell, markdown
from prune_lightning.report.studies.runs import by, last, option

_SCORES = {
    "efficacy": "edit/counterfact/efficacy_score",
    "generalization": "edit/counterfact/generalization_score",
    "locality": "edit/counterfact/locality_score",
    "harmonic mean S": "edit/counterfact/harmonic_score",
}
_LINES = {"sequential_batched": ("o-", "one batch after another"), "batch": ("x--", "each on the unedited model")}
_Key = tuple[str, str, int]


def batch(runs: Sequence[FinishedRun]) -> tuple[str, Figure]:
    """Return CounterFact's scores by batch size under both protocols, and those of one batch by layer.

    Runs whose folder is in a ``study_layers`` belong to the scan of layers.
    """
    scan = [run for run in runs if "study_layers" in run.folder.parts]
    sizes = by([run for run in runs if run not in scan], _setting)
    layers = by(scan, lambda run: (str(run.summary["method"]), "layer", int(_layers(run)[0])))
    drawing = Figure(figsize=(3.4 * len(_SCORES), 3.1 * (2 if layers else 1)), layout="constrained")
    grid = drawing.subplots(2 if layers else 1, len(_SCORES), squeeze=False, sharey="col", sharex="row")
    methods = list(dict.fromkeys(method for method, _, _ in [*sizes, *layers]))
    for place, (title, key) in enumerate(_SCORES.items()):
        _lines(grid[0][place], sizes, methods, key)
        grid[0][place].set(title=title, xlabel="edits in a batch", xscale="log", ylim=(-0.03, 1.05))
        counts = sorted({size for _, _, size in sizes})
        grid[0][place].set_xticks(counts, [str(count) for count in counts])
        grid[0][place].minorticks_off()
        if layers:
            _lines(grid[1][place], layers, methods, key)
            grid[1][place].set(xlabel="edited layer", ylim=(-0.03, 1.05))
            grid[1][place].set_xticks(sorted({layer for _, _, layer in layers}))
    grid[0][0].set_ylabel("score")
    handles, names = grid[0][0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return _table(sizes, layers), drawing


def _setting(run: FinishedRun) -> _Key:
    return str(run.summary["method"]), str(option(run, "data.protocol")), int(option(run, "data.batch_size"))


def _layers(run: FinishedRun) -> list[int]:
    return list(option(run, "method.layers"))


def _lines(axes: Axes, groups: dict[_Key, Group], methods: Sequence[str], key: str) -> None:
    for number, method in enumerate(methods):
        for protocol in dict.fromkeys(name for _, name, _ in groups):
            points = {x: group for (m, p, x), group in groups.items() if (m, p) == (method, protocol)}
            style, text = _LINES.get(protocol, ("o-", ""))
            x = sorted(points)
            axes.plot(x, [last(points[at], key) for at in x], style, color=f"C{number}", label=f"{method}, {text}")
    axes.grid(alpha=0.3)


def _table(sizes: dict[_Key, Group], layers: dict[_Key, Group]) -> str:
    groups = [*sizes.values(), *layers.values()]
    keys = Keys.common(list(sizes.values()))
    heads = ["editor", "batches", "size", *_SCORES, "retention"]
    rows: list[list[Cell]] = []
    for (method, protocol, size), group in sorted(sizes.items()):
        kept = None if protocol == "batch" else last(group, keys.kept)
        rows.append([method, _LINES[protocol][1], size, *(last(group, key) for key in _SCORES.values()), kept])
    run = groups[0].runs[0]
    text = f"{run['model']}, {run['data']}, {groups[0].counts[-1]} edits:\n\n{markdown(heads, rows)}"
    if layers:
        lines: list[list[Cell]] = [
            [method, layer, *(last(group, key) for key in _SCORES.values())]
            for (method, _, layer), group in sorted(layers.items())
        ]
        text += f"\n\nOne batch at each layer:\n\n{markdown(['editor', 'layer', *_SCORES], lines)}"
    return text
