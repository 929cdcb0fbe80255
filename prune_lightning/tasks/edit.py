"""The main job: edit a model with a stream of requests, and show what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from prune_lightning.callbacks import (
    EditEvaluation,
    EditLedger,
    EditLog,
    Guards,
    RunLog,
    RunProgress,
    SpectrumMonitor,
    spectra,
)
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError, one_of
from prune_lightning.evaluation.measurement import Measurement
from prune_lightning.evaluation.stream import FORMS, entries
from prune_lightning.json_files import write_json
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_language_model
from prune_lightning.report.curves import plot_abilities, plot_editing, plot_immediate, plot_retention
from prune_lightning.report.page import write_page
from prune_lightning.report.plots import Spectra, plot_spectra, save_plots, show_figure
from prune_lightning.report.table import result_table
from prune_lightning.report.trajectories import ability_trajectories, edit_trajectories, log_growth
from prune_lightning.tasks.collapse import bisect_collapses
from prune_lightning.tasks.exporting import export_all, formats_wanted, raise_failed
from prune_lightning.tasks.resuming import ledger_to_go_on_with
from prune_lightning.tasks.setup import (
    build_loggers,
    build_trainer,
    choice,
    first_process,
    quieten,
    run_clock,
    run_folder,
)


def run(config: DictConfig) -> None:
    """Edit, evaluate, and leave the results in the run folder."""
    clock = run_clock()
    quieten()
    folder = run_folder(resumed=bool(config.resume))
    L.seed_everything(config.seed, verbose=False)
    out = Console()
    run_log = RunLog(clock)
    with RunProgress(clock, Console(stderr=True, quiet=not (config.progress and first_process()))):
        with clock.phase("load"):
            restraint = instantiate(config.restraint) if config.restraint else None
            further = _further_callbacks(config, folder)
            log = EditLog(folder / "edits.jsonl")
            measurements = _measurements(config)
            evaluation = _evaluation(config, measurements, edit_log=log, cases_file=folder / "cases.jsonl")
            stream: EditStream = instantiate(config.data)
            stream.setup()
            ledger = ledger_to_go_on_with(config.resume, folder, stream)
            formats = formats_wanted(config, stream)
            module = _method(config)
            module.phase_clock = clock
            loggers = build_loggers(config, folder, keep=stream.skip if config.resume else None)
            callbacks = [*([restraint] if restraint else []), *further, log, evaluation, run_log]
            if config.ledger:
                callbacks.append(EditLedger(folder / "ledger", _base(config), ledger))
            trainer = build_trainer(config, callbacks, loggers)
        with clock.phase("edit"):
            trainer.fit(module, datamodule=stream)
        stream.skip = 0
        with clock.phase("bisect"):
            collapses = _collapses(config, module, evaluation, trainer, restraint)
        with clock.phase("spectrum"):
            looked_at = spectra(module.edited_matrices().values())
        with clock.phase("export"):
            exports = export_all(formats if trainer.is_global_zero else [], config, folder, module, stream, out)
        with clock.prefixed("control/"):
            control = _control(config, module, stream, run_log, evaluation) if restraint and config.control else None
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
        **_times(evaluation, log),
        "baseline": evaluation.baseline,
        "final": _scores(evaluation.curve[-1]),
        "curve": evaluation.curve,
        "intervals": evaluation.intervals,
        "stream": {**_stream_summary(evaluation), "collapses": collapses},
        "spectrum": _spectrum_summary(further),
        "guards": next((callback.summary() for callback in further if isinstance(callback, Guards)), None),
        "control": control and _control_summary(control),
        "case_rows_left_out": evaluation.case_rows.left_out,
        "exports": exports,
        "rejected_records": len(stream.rejected),
        "method_facts": module.facts,
        "context_prefixes": list(getattr(module, "prefixes", ())),
    }
    with clock.phase("report"):
        _report(config, folder, summary, looked_at, loggers, evaluation, out)
    summary["phases"] = clock.seconds()
    summary["wall_s"] = sum(summary["phases"].values())
    write_json(folder / "summary.json", summary)
    left = "report.html, summary.json, edits.jsonl, cases.jsonl, metrics.csv, plots/, ledger/"
    out.print(f"The run lies in [bold]{folder}[/bold]: {left}")
    raise_failed(exports)


def _further_callbacks(config: DictConfig, folder: Path) -> list[L.Callback]:
    further: list[L.Callback] = [instantiate(callback) for callback in (config.callbacks or {}).values()]
    for callback in further:
        if isinstance(callback, Guards):
            callback.path = folder / "quarantine.jsonl"
    return further


def _method(config: DictConfig) -> EditingModule:
    model = load_language_model(config.model.path, config.model.dtype, config.model.revision)
    module = instantiate(config.method, language_model=model, _convert_="all")
    assert isinstance(module, EditingModule)
    one_of("non_finite", config.non_finite, ("skip", "raise"))
    module.non_finite = config.non_finite
    return module


def _base(config: DictConfig) -> dict[str, Any]:
    """Return what the ledger has to say of the run, besides the fingerprints of the weights."""
    return {
        "model": {key: config.model[key] for key in ("path", "revision", "dtype")},
        "method": choice("method"),
        "restraint": choice("restraint"),
        "data": choice("data"),
        "seed": config.seed,
        "method_options": OmegaConf.to_container(config.method, resolve=True),
        "restraint_options": OmegaConf.to_container(config.restraint, resolve=True) if config.restraint else None,
    }


def _is_measurement(entry: Any) -> bool:
    return isinstance(entry, DictConfig) and "_target_" in entry


def _measurements(config: DictConfig) -> list[Measurement]:
    return [instantiate(entry, _convert_="all") for entry in config.evaluation.values() if _is_measurement(entry)]


def _evaluation(config: DictConfig, measurements: Sequence[Measurement], **further: Any) -> EditEvaluation:
    """Return the evaluation; what is no measurement in its configuration is an argument of it."""
    options = OmegaConf.to_container(config.evaluation, resolve=True)
    assert isinstance(options, dict)
    own = {str(name): options[name] for name, entry in config.evaluation.items() if not _is_measurement(entry)}
    return EditEvaluation(measurements=measurements, seed=config.seed, **own, **further)


def _collapses(
    config: DictConfig, module: EditingModule, evaluation: EditEvaluation, trainer: L.Trainer, restraint: Any
) -> dict[str, int]:
    """Return the edits to collapse to the step, if that was asked for."""
    if not config.bisect_collapse or not trainer.is_global_zero:
        return {}
    ledgers = [c.ledger for c in trainer.callbacks if isinstance(c, EditLedger)]  # type: ignore[attr-defined]
    if not ledgers or ledgers[0] is None or getattr(restraint, "schedule", "") == "end":
        raise UserError("bisect_collapse brings back earlier states: it needs ledger=true, and no restraint at the end")
    return bisect_collapses(module, ledgers[0], evaluation, restraint.restrain if restraint else None)


def _control(
    config: DictConfig, module: EditingModule, stream: EditStream, run_log: RunLog, main: EditEvaluation
) -> EditEvaluation:
    """Edit the same stream again without the restraint, as far as the run went."""
    steps = module.num_steps
    module.restart()
    log = EditLog(None)
    evaluation = _evaluation(config, main.measurements, edit_log=log, earlier=main)
    trainer = build_trainer(config, [log, evaluation, run_log], [], max_steps=steps)
    with module.phase_clock.phase("edit"):
        trainer.fit(module, datamodule=stream)
    return evaluation


def _control_summary(control: EditEvaluation) -> dict[str, Any]:
    return {
        "final": _scores(control.curve[-1]),
        "curve": control.curve,
        "intervals": control.intervals,
        "stream": _stream_summary(control),
    }


def _times(evaluation: EditEvaluation, log: EditLog) -> dict[str, Any]:
    """Return the seconds spent on edits and on evaluation, and the share of evaluation in both together."""
    by_name = {**evaluation.seconds, "edit log": log.scoring_seconds}
    spent = sum(by_name.values())
    share = spent / (spent + log.seconds)
    return {"edit_s": log.seconds, "evaluate_s": spent, "evaluate_s_by": by_name, "evaluate_share": share}


def _stream_summary(evaluation: EditEvaluation) -> dict[str, Any]:
    """Return what is to say about the stream as a whole, beyond the figures that each evaluation has."""
    groups = [measurement for measurement in evaluation.measurements if measurement.tasks]
    abilities = [f"{m.name}/{key}" for m in groups for key in ("retention", *m.tasks)]
    return {
        "forms": evaluation.stream.details() if evaluation.stream else {},
        "abilities": ability_trajectories(evaluation.curve, abilities),
        "edits": edit_trajectories(evaluation.curve, [f"stream/{form}/final" for form in FORMS]),
    }


def _spectrum_summary(callbacks: Sequence[L.Callback]) -> dict[str, Any] | None:
    monitors = [callback for callback in callbacks if isinstance(callback, SpectrumMonitor)]
    return {"curve": monitors[0].curve, "log_growth": log_growth(monitors[0].curve)} if monitors else None


def _scores(entry: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if key != "num_edits"}


def _stream_figures(evaluation: EditEvaluation, summary: dict[str, Any], title: str) -> dict[str, Figure | None]:
    """Return the pictures of how edits hold along the stream."""
    if not evaluation.stream:
        return {}
    figures = {"immediate": plot_immediate({title: summary["curve"]}, summary["stream"]["forms"], title)}
    for form, what in zip(FORMS, ("new answer preferred to the old one", "new answer said outright"), strict=True):
        if evaluation.stream.matrices[form].update_called:
            figures[f"retention_{form}"] = plot_retention(entries(evaluation.stream.matrices[form]), what)
    return figures


def _report(
    config: DictConfig,
    folder: Path,
    summary: dict[str, Any],
    looked_at: list[Spectra],
    loggers: list[Logger],
    evaluation: EditEvaluation,
    out: Console,
) -> None:
    """Print the table, draw the plots, write the page, and hand table and plots to loggers that take them."""
    edits = f"{summary['num_edits']} edits"
    restrained = "no restraint" if summary["restraint"] == "none" else summary["restraint"]
    title = f"{summary['method']}, {restrained}: {edits} (data: {summary['data']}, model: {summary['model']})"
    columns = {"before": summary["baseline"], f"after {edits}": summary["final"]}
    curves, intervals = {restrained: summary["curve"]}, {restrained: summary["intervals"]}
    if control := summary["control"]:
        columns["without restraint"] = control["final"]
        curves["without restraint"], intervals["without restraint"] = control["curve"], control["intervals"]
    drawn = {
        "abilities": plot_abilities(curves, intervals),
        "editing": plot_editing(curves, intervals),
        **_stream_figures(evaluation, summary, title),
    }
    figures = {name: figure for name, figure in drawn.items() if figure} | {"spectra": plot_spectra(looked_at)}
    plots = save_plots(folder / "plots", figures)
    remark = (
        f"{summary['edit_s']:.0f} s of edits, {summary['evaluate_s']:.0f} s of evaluation "
        f"({100 * summary['evaluate_share']:.0f} % of both). Bands are 95 % bootstrap intervals over cases."
    )
    write_page(folder / "report.html", title, columns, plots, OmegaConf.to_yaml(config, resolve=True), [remark])
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
