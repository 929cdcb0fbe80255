"""The report of a run: the table, the plots, the page, and their copies in loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from prune_lightning.callbacks import EditEvaluation
from prune_lightning.evaluation.stream import FORMS, entries
from prune_lightning.report.curves import plot_abilities, plot_editing, plot_immediate, plot_retention
from prune_lightning.report.labels import Labels
from prune_lightning.report.page import write_page
from prune_lightning.report.plots import Spectra, plot_spectra, save_plots, show_figure
from prune_lightning.report.summary import RunSummary
from prune_lightning.report.table import result_table
from prune_lightning.tasks.edit_table import COLUMNS
from prune_lightning.tasks.setup import close_loggers
from prune_lightning.tasks.tracking import hand_over


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
    edits = f"{summary['num_requests']} edits"
    restrained = "no restraint" if summary["restraint"] == "none" else summary["restraint"]
    title = f"{summary['method']}, {restrained}: {edits} (data: {summary['data']}, model: {summary['model']})"
    columns = {"before": summary["baseline"], f"after {edits}": summary["final"]}
    curves, intervals = {restrained: summary["curve"]}, {restrained: summary["intervals"]}
    if control := summary["control"]:
        columns["without restraint"] = control["final"]
        curves["without restraint"], intervals["without restraint"] = control["curve"], control["intervals"]
    labels = Labels(summary["labels"])
    drawn = {
        "abilities": plot_abilities(curves, intervals, labels),
        "editing": plot_editing(curves, intervals, labels),
        **_stream_figures(evaluation, summary, title, labels),
    }
    figures = {name: figure for name, figure in drawn.items() if figure} | {"spectra": plot_spectra(looked_at)}
    plots = save_plots(folder / "plots", figures)
    timing = (
        f"{summary['edit_s']:.0f} s of edits, {summary['evaluate_s']:.0f} s of evaluation "
        f"({100 * summary['evaluate_share']:.0f} % of both). Bands are 95 % bootstrap intervals over cases."
    )
    remarks = [timing, *evaluation.remarks()]
    write_page(folder / "report.html", title, columns, plots, OmegaConf.to_yaml(config, resolve=True), remarks, labels)
    for logger in loggers:
        _log_curve(logger, control["curve"] if control else [])
        _log(logger, columns, figures, answers, summary["num_requests"])
    hand_over(loggers, _headline(summary), folder)
    close_loggers(loggers)
    out.print(result_table(title, columns, labels))
    for remark in evaluation.remarks():
        out.print(remark)


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
