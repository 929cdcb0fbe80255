"""The main job: edit a model with a stream of requests, and show what it cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from prune_lightning.callbacks import EditEvaluation, EditLog, RunProgress, spectra
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import one_of
from prune_lightning.jsonable import write_json
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_language_model
from prune_lightning.report.page import write_page
from prune_lightning.report.plots import Spectra, plot_abilities, plot_editing, plot_spectra, save_plots, show_figure
from prune_lightning.report.table import result_table
from prune_lightning.tasks.exporting import export_all, formats_wanted, raise_failed
from prune_lightning.tasks.setup import build_loggers, build_trainer, choice, first_process, quieten, run_folder


def run(config: DictConfig) -> None:
    """Edit, evaluate, and leave the results in the run folder."""
    started = time.perf_counter()
    quieten()
    folder = run_folder()
    L.seed_everything(config.seed, verbose=False)
    out = Console()
    progress = RunProgress(Console(stderr=True, quiet=not (config.progress and first_process())))
    with progress:
        with progress.phase("load"):
            restraint = instantiate(config.restraint) if config.restraint else None
            further = [instantiate(callback) for callback in (config.callbacks or {}).values()]
            evaluation = _evaluation(config)
            stream: EditStream = instantiate(config.data)
            stream.setup()
            formats = formats_wanted(config, stream)
            module = _method(config)
        log = EditLog(folder / "edits.jsonl")
        loggers = build_loggers(config, folder)
        callbacks = [*([restraint] if restraint else []), progress, *further, evaluation, log]
        trainer = build_trainer(config, callbacks, loggers)
        trainer.fit(module, datamodule=stream)
        looked_at = spectra(module.edited_matrices().values())
        exports = export_all(formats if trainer.is_global_zero else [], config, folder, module, stream, out)
        control = _control(config, module, stream, progress, evaluation) if restraint and config.control else None
    if not trainer.is_global_zero:
        return
    summary = {
        "num_edits": module.num_edits,
        "method": choice("method"),
        "restraint": choice("restraint"),
        "restraint_options": OmegaConf.to_container(config.restraint, resolve=True) if restraint else None,
        "model": choice("model"),
        "data": choice("data"),
        "protocol": stream.protocol.value,
        "seed": config.seed,
        "edit_s": log.seconds,
        "evaluate_s": evaluation.seconds,
        "baseline": evaluation.baseline,
        "final": _scores(evaluation.curve[-1]),
        "curve": evaluation.curve,
        "control": control and {"final": _scores(control[-1]), "curve": control},
        "exports": exports,
        "rejected_records": len(stream.rejected),
        "method_facts": module.facts,
        "context_prefixes": list(getattr(module, "prefixes", ())),
    }
    _report(config, folder, summary, looked_at, loggers, out)
    summary["wall_s"] = time.perf_counter() - started
    write_json(folder / "summary.json", summary)
    out.print(f"The run lies in [bold]{folder}[/bold]: report.html, summary.json, edits.jsonl, metrics.csv, plots/")
    raise_failed(exports)


def _method(config: DictConfig) -> EditingModule:
    model = load_language_model(config.model.path, config.model.dtype, config.model.revision)
    moments = instantiate(config.model.second_moments, _convert_="all")
    module = instantiate(config.method, language_model=model, second_moments=moments, _convert_="all")
    assert isinstance(module, EditingModule)
    one_of("non_finite", config.non_finite, ("skip", "raise"))
    module.non_finite = config.non_finite
    return module


def _evaluation(config: DictConfig) -> EditEvaluation:
    """Return the evaluation; every entry of its configuration that has a target is a measurement."""
    entries = [entry for entry in config.evaluation.values() if isinstance(entry, DictConfig) and "_target_" in entry]
    return EditEvaluation(list(config.evaluation.counts), [instantiate(e, _convert_="all") for e in entries])


def _control(
    config: DictConfig, module: EditingModule, stream: EditStream, progress: RunProgress, main: EditEvaluation
) -> list[dict[str, float]]:
    """Edit the same stream again without the restraint; return the curve."""
    module.restart()
    progress.prefix = "without restraint: "
    evaluation = EditEvaluation(main.counts, main.measurements, main.baseline)
    build_trainer(config, [progress, evaluation], []).fit(module, datamodule=stream)
    return evaluation.curve


def _scores(entry: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if key != "num_edits"}


def _report(
    config: DictConfig,
    folder: Path,
    summary: dict[str, Any],
    looked_at: list[Spectra],
    loggers: list[Logger],
    out: Console,
) -> None:
    """Print the table, draw the plots, write the page, and hand table and plots to loggers that take them."""
    edits = f"{summary['num_edits']} edits"
    restrained = "no restraint" if summary["restraint"] == "none" else summary["restraint"]
    title = f"{summary['method']}, {restrained}: {edits} (data: {summary['data']}, model: {summary['model']})"
    columns = {"before": summary["baseline"], f"after {edits}": summary["final"]}
    curves = {restrained: summary["curve"]}
    if summary["control"]:
        columns["without restraint"] = summary["control"]["final"]
        curves["without restraint"] = summary["control"]["curve"]
    figures = {"editing": plot_editing(curves), "spectra": plot_spectra(looked_at)}
    if any(key.startswith("ability/") for key in summary["final"]):
        figures = {"abilities": plot_abilities(curves), **figures}
    plots = save_plots(folder / "plots", figures)
    write_page(folder / "report.html", title, columns, plots, OmegaConf.to_yaml(config, resolve=True))
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        for name, figure in figures.items():
            show_figure(logger, name, figure, step=summary["num_edits"])
        if hasattr(logger, "log_table"):
            names = sorted(set().union(*columns.values()))
            data = [[name, *(scores.get(name) for scores in columns.values())] for name in names]
            logger.log_table(key="result", columns=["metric", *columns], data=data, step=summary["num_edits"])
        logger.finalize("success")
    out.print(result_table(title, columns))
