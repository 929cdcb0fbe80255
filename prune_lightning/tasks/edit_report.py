"""The report of a run: the table, the plots, the page, and their copies in loggers."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from prune_lightning import __version__
from prune_lightning.callbacks import EditEvaluation
from prune_lightning.evaluation.stream import FORMS, entries
from prune_lightning.report.curves import plot_abilities, plot_editing, plot_immediate, plot_retention
from prune_lightning.report.headline import sentence
from prune_lightning.report.labels import Labels
from prune_lightning.report.page import write_page
from prune_lightning.report.plots import Spectra, plot_spectra, save_plots, show_figure
from prune_lightning.report.printed import columns_of, print_result
from prune_lightning.report.summary import RunSummary
from prune_lightning.tasks.edit_table import COLUMNS
from prune_lightning.tasks.setup import close_loggers
from prune_lightning.tasks.tracking import hand_over

_PICTURES = {
    "spectra": "Singular values of the edited weights",
    "retention_score": "Each edit at each evaluated count: success",
    "retention_accuracy": "Each edit at each evaluated count: exact match",
}


def report(
    config: DictConfig,
    folder: Path,
    summary: RunSummary,
    looked_at: list[Spectra],
    loggers: list[Logger],
    answers: list[list[Any]],
    evaluation: EditEvaluation,
    out: Console,
) -> None:
    """Print the table, draw the plots, write the page, and log table and plots to loggers that support them."""
    entries = summary.entries
    columns, labels = columns_of(entries), Labels(summary["labels"])
    titles, control = list(columns), summary["control"]
    curves, intervals = {titles[1]: summary["curve"]}, {titles[1]: summary["intervals"]}
    if control:
        curves[titles[2]], intervals[titles[2]] = control["curve"], control["intervals"]
    about = f"{sentence(entries)} (data: {summary['data']}, model: {summary['model']})"
    drawn = {
        "abilities": plot_abilities(curves, intervals, labels),
        "editing": plot_editing(curves, intervals, labels),
        **_stream_figures(evaluation, summary, about, labels),
        "spectra": plot_spectra(looked_at),
    }
    figures = {name: figure for name, figure in drawn.items() if figure}
    plots = {path.stem: path for path in save_plots(folder / "plots", figures)}
    pictures = {title: plots[name] for name, title in _PICTURES.items() if name in plots}
    write_page(folder, entries, OmegaConf.to_yaml(config, resolve=True), pictures, evaluation.remarks())
    for logger in loggers:
        _log_curve(logger, control["curve"] if control else [])
        _log(logger, columns, figures, answers, summary["num_requests"])
    hand_over(loggers, _headline(summary), folder)
    close_loggers(loggers)
    print_result(entries, out, config.all_scores)
    for remark in evaluation.remarks():
        out.print(remark, markup=False)


def origin(looked_at: list[Spectra]) -> dict[str, Any]:
    """Return what a reader needs to know to make the run again, and to judge its spectra."""
    overrides = list(HydraConfig.get().overrides.task)
    packages = ("torch", "transformers", "lightning", "numpy")
    return {
        "command": shlex.join(["python", "train.py", *overrides]),
        "overrides": overrides,
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "versions": {
            "prune-lightning": __version__,
            "Python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "original_sigma_max": {matrix.name: float(matrix.original[0]) for matrix in looked_at},
    }


def _stream_figures(
    evaluation: EditEvaluation, summary: RunSummary, title: str, labels: Labels
) -> dict[str, Figure | None]:
    """Return the pictures of how edits hold along the stream."""
    stream = evaluation.evaluator.stream
    if not stream:
        return {}
    figures = {"immediate": plot_immediate({title: summary["curve"]}, summary["stream"]["forms"], title, labels)}
    for form, what in zip(
        FORMS, ("success: new answer likelier than the old one", "exact match of the new answer"), strict=True
    ):
        if stream.matrices[form].update_called:
            figures[f"retention_{form}"] = plot_retention(entries(stream.matrices[form]), what)
    return figures


def _log_curve(logger: Logger, curve: Sequence[Mapping[str, float]]) -> None:
    """Log the control run as curves of its own, `control/NAME`, on the axis of the run."""
    for entry in curve:
        scores = {f"control/{name}": score for name, score in entry.items() if name != "num_requests"}
        logger.log_metrics(scores, step=int(entry["num_requests"]))


def _headline(summary: RunSummary) -> dict[str, float]:
    """Return the scores before and after, and those of the control run, for the summary of a tracker."""
    control = summary["control"]
    parts = {"before": summary["baseline"], "final": summary["final"], "control": control["final"] if control else {}}
    scores = {f"{part}/{name}": score for part, entry in parts.items() for name, score in entry.items()}
    return scores | {name: summary[name] for name in ("num_requests", "edit_s", "evaluate_s")}


def _log(
    logger: Logger,
    columns: dict[str, Any],
    figures: dict[str, Figure],
    answers: list[list[Any]],
    num_requests: int,
) -> None:
    for name, figure in figures.items():
        show_figure(logger, name, figure, step=num_requests)
    if hasattr(logger, "log_table"):
        names = sorted(set().union(*columns.values()))
        data = [[name, *(scores.get(name) for scores in columns.values())] for name in names]
        logger.log_table(key="result", columns=["metric", *columns], data=data, step=num_requests)
        if answers:
            logger.log_table(key="edits", columns=list(COLUMNS), data=answers, step=num_requests)
    logger.finalize("success")
