"""The main job: edit a model with a stream of requests and report the results."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from prune_lightning.atomic_files import write_json
from prune_lightning.callbacks import EditEvaluation, EditLedger, EditLog, RunLog, RunProgress, spectra
from prune_lightning.data.stream import EditStream
from prune_lightning.evaluation.answers import Answers
from prune_lightning.evaluation.measurement import Measurement
from prune_lightning.evaluation.stream import StreamScores
from prune_lightning.ledger import Ledger
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_tokens
from prune_lightning.phases import PhaseClock
from prune_lightning.report.labels import shown_name
from prune_lightning.report.summary import RunSummary
from prune_lightning.tasks.arguments import record_settings
from prune_lightning.tasks.collapse import bisect_collapses
from prune_lightning.tasks.components import build, check_arguments, check_component, check_components
from prune_lightning.tasks.edit_report import origin, report
from prune_lightning.tasks.edit_table import edit_rows
from prune_lightning.tasks.exporting import export_all, raise_failed
from prune_lightning.tasks.hparams import compare_stream
from prune_lightning.tasks.knowing import select_records
from prune_lightning.tasks.preflight import check_bisection, check_run, formats_wanted
from prune_lightning.tasks.presets import load_model, model_facts, settled
from prune_lightning.tasks.recipe import Recipe
from prune_lightning.tasks.resuming import NothingToResume, check_recipe, check_stream, ledger_to_resume, settle_resume
from prune_lightning.tasks.setup import (
    build_loggers,
    build_trainer,
    choice,
    first_process,
    fit,
    quieten,
    run_clock,
    run_folder,
    settle_trainer,
    usable_by,
)
from prune_lightning.types import EditStep


def run(config: DictConfig) -> None:
    """Edit, evaluate, and write the results to the run folder."""
    given = copy.deepcopy(config)
    automatic = settle_resume(config, Path(HydraConfig.get().runtime.output_dir))
    try:
        _run(config, given)
    except NothingToResume as complete:
        if not automatic:
            raise
        Console().print(f"skipped: {complete}", markup=False)


def _run(config: DictConfig, given: DictConfig) -> None:
    clock = run_clock()
    quieten()
    with clock.phase("check"):
        settle_trainer(config)
        config = settled(config)
        check_components(config)
        _callbacks(config)
        check_arguments(EditEvaluation, _evaluation_options(config), "evaluation")
    folder = run_folder(resumed=bool(config.resume))
    L.seed_everything(config.seed, verbose=False)
    out = Console()
    run_log = RunLog(clock)
    with RunProgress(clock, Console(stderr=True, quiet=not (config.progress and first_process()))):
        with clock.phase("load"):
            job = _load(config, folder, clock)
            if config.resume and first_process():  # nothing refuses to go on in this folder
                record_settings(given)
            loggers = build_loggers(config, folder, keep=sum(job.stream.done) if config.resume else None)
            trainer = build_trainer(config, [*job.callbacks(), run_log, *job.ledger_callback()], loggers, folder)
        check_bisection(config, job.ledger, job.restraint, job.stream, trainer)
        with clock.phase("edit"):
            fit(trainer, job.module, job.stream)
        with clock.phase("bisect"):
            collapses = _collapses(config, job)
        with clock.phase("spectrum"):
            looked_at = spectra(job.module.edited_matrices().values())
        with clock.phase("answers"):
            from_base = job.stream.protocol.from_base
            told = loggers if trainer.is_global_zero else []
            answers = edit_rows(job.module, folder / "edits.jsonl", told, from_base)
        with clock.phase("export"):
            exports = export_all(job.formats, config, folder, job.module, job.stream, out)
        summary = RunSummary(_about(config, job)).collect([job.module, job.stream, *job.callbacks()])
        with clock.prefixed("control/"):
            restrained = job.restraint and job.module.edited_matrices()
            control = _control(config, job, run_log) if restrained and config.control else None
    if not trainer.is_global_zero:
        return
    summary.add({"evaluate_share": _share(summary), **origin(looked_at)})
    summary.add({"exports": exports, "control": control and _compared(job.evaluation, control)})
    summary["stream"]["collapses"] = collapses
    with clock.phase("report"):
        report(config, folder, summary, looked_at, loggers, answers, job.evaluation, out)
    seconds = clock.seconds()
    summary.add({"phases": seconds, "wall_s": sum(seconds.values())})
    write_json(folder / "summary.json", summary.entries)
    left = "report.html, summary.json, edits.jsonl, cases.jsonl, metrics.csv, plots/, ledger/"
    out.print(f"The run lies in [bold]{folder}[/bold]: {left}")
    raise_failed(exports)


@dataclass(frozen=True)
class Job:
    """The parts of a run.

    Args:
        module: The method, on its model.
        stream: The edits.
        restraint: The restraint; ``None`` without one.
        further: Guards, monitors and other callbacks of the configuration, in its order.
        log: The edit log.
        evaluation: The evaluation.
        ledger: The ledger's callback; ``None`` without a ledger.
        formats: Formats to export.
    """

    module: EditingModule
    stream: EditStream
    restraint: Any
    further: Sequence[L.Callback]
    log: EditLog
    evaluation: EditEvaluation
    ledger: EditLedger | None
    formats: list[str]

    def callbacks(self) -> list[L.Callback]:
        """Return all callbacks but the ledger's, in order."""
        return [*([self.restraint] if self.restraint else []), *self.further, self.log, self.evaluation]

    def ledger_callback(self) -> list[L.Callback]:
        """Return the ledger's callback, if there is one."""
        return [self.ledger] if self.ledger else []


def _load(config: DictConfig, folder: Path, clock: PhaseClock) -> Job:
    """Build everything, so that configuration errors are found before anything is computed."""
    restraint = build(config.restraint, "restraint") if config.restraint else None
    further = [build(entry, key) for key, entry in _callbacks(config).items()]
    measurements = _measurements(config)
    ledger = ledger_to_resume(config.resume, folder)
    if ledger:
        check_recipe(ledger, Recipe.of(config))
    stream: EditStream = build(config.data, "data", done=ledger.sizes if ledger else ())
    stream.fit(load_tokens(config.model.path, config.model.revision), usable_by(config.method))
    if ledger and not stream.rule.needs_model:
        check_stream(ledger, stream)
    module = _method(config, clock)
    check_run(config, module, stream, restraint, measurements)
    select_records(config, stream, module.language_model, folder, clock)
    compare_stream(config, stream.requests)
    if ledger and stream.rule.needs_model:
        check_stream(ledger, stream)
    scores = None if stream.protocol.from_base else StreamScores(stream.superseded())
    log = EditLog(folder / "edits.jsonl", scores)
    evaluation = _evaluation(config, measurements, stream=scores, cases_file=folder / "cases.jsonl", clock=clock)
    keeper = _ledger(config, folder, ledger) if config.ledger else None
    return Job(module, stream, restraint, further, log, evaluation, keeper, formats_wanted(config))


def _method(config: DictConfig, clock: PhaseClock) -> EditingModule:
    model = load_model(config)
    module = build(config.method, "method", language_model=model, non_finite=config.non_finite, clock=clock)
    assert isinstance(module, EditingModule)
    return module


def _ledger(config: DictConfig, folder: Path, ledger: Ledger | None) -> EditLedger:
    base = {**Recipe.of(config).as_base(), "data": choice("data")}
    return EditLedger(folder / "ledger", base, ledger, config.snapshot_every)


def _callbacks(config: DictConfig) -> dict[str, DictConfig]:
    """Return the entries of the callbacks that are not null, by key.

    Raises:
        UserError: One is no component.
    """
    found = {f"callbacks.{name}": entry for name, entry in (config.callbacks or {}).items() if entry is not None}
    for key, entry in found.items():
        check_component(entry, key)
    return found


def _is_measurement(entry: Any) -> bool:
    return isinstance(entry, DictConfig) and "_target_" in entry


def _measurements(config: DictConfig) -> list[Measurement]:
    return [build(entry, f"evaluation.{name}") for name, entry in config.evaluation.items() if _is_measurement(entry)]


def _evaluation_options(config: DictConfig) -> dict[str, Any]:
    """Return the entries of the evaluation's configuration that are not measurements."""
    options = OmegaConf.to_container(config.evaluation, resolve=True)
    assert isinstance(options, dict)
    return {str(name): options[name] for name, entry in config.evaluation.items() if not _is_measurement(entry)}


def _evaluation(config: DictConfig, measurements: Sequence[Measurement], **further: Any) -> EditEvaluation:
    """Return the evaluation. Entries of its configuration that are not measurements are its arguments."""
    options = _evaluation_options(config)
    return EditEvaluation(measurements=measurements, seed=config.seed, **options, **further)


def _about(config: DictConfig, job: Job) -> dict[str, Any]:
    """Return a description of the run."""
    return {
        "method": choice("method"),
        "restraint": choice("restraint"),
        "titles": {"method": shown_name(choice("method"), type(job.module).__name__)},
        "device": str(job.module.device),
        "restraint_options": OmegaConf.to_container(config.restraint, resolve=True) if job.restraint else None,
        **model_facts(config),
        "data": choice("data"),
        "seed": config.seed,
    }


def _compared(evaluation: EditEvaluation, control: EditEvaluation) -> dict[str, Any]:
    """Return the summary of the control run, with the differences between the run and it."""
    return RunSummary({"differences": evaluation.evaluator.difference(control.evaluator)}).collect([control]).entries


def _share(summary: RunSummary) -> float:
    """Return the share of evaluation in edits and evaluation together."""
    spent = summary["evaluate_s"] + summary["edit_log_s"]
    return float(spent / ((spent + summary["edit_s"]) or 1.0))


def _collapses(config: DictConfig, job: Job) -> dict[str, int]:
    """Return the exact number of edits to collapse, if requested."""
    if not config.bisect_collapse:
        return {}
    assert job.ledger is not None
    assert job.ledger.ledger is not None
    restrain = job.restraint.restrain if job.restraint else None
    return bisect_collapses(job.module, job.ledger.ledger, job.evaluation, restrain)


def _control(config: DictConfig, job: Job, run_log: RunLog) -> EditEvaluation:
    """Write the same edits again without the restraint: up to the same one, and without those that were refused."""
    run, refused = job.module.run, _refused(job.log)
    steps = run.num_steps
    run.restart()
    scores = None if job.stream.protocol.from_base else StreamScores(job.stream.superseded())
    clock = job.module.clock
    measurements = [m for m in job.evaluation.measurements if not isinstance(m, Answers)]
    evaluation = _evaluation(config, measurements, stream=scores, earlier=job.evaluation, clock=clock)
    trainer = build_trainer(config, [EditLog(None, scores), evaluation, run_log], [], max_steps=steps)

    def veto(step: EditStep) -> str | None:
        return "refused in the run" if run.num_requests + 1 in refused else None

    run.register_veto(veto)
    with clock.phase("edit"):
        fit(trainer, job.module, job.stream.from_start())
    run.remove_veto(veto)
    return evaluation


def _refused(log: EditLog) -> set[int]:
    """Return the numbers of the requests that were not written."""
    assert log.path is not None
    lines = (json.loads(line) for line in log.path.read_text("utf-8").splitlines())
    return {line["num_requests"] for line in lines if not line["applied"]}
