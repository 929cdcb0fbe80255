"""The job that finds hyper-parameters of a method and a restraint for a model, on pilot edits."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from prune_lightning.atomic_files import write_json
from prune_lightning.callbacks import RunLog, RunProgress
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.phases import PhaseClock
from prune_lightning.report.plots import save_plots
from prune_lightning.report.tuning import plot_tuning
from prune_lightning.requests import EditRequest
from prune_lightning.tasks.components import check_components
from prune_lightning.tasks.hparams import edit_marks, write_hparams
from prune_lightning.tasks.knowing import select_records
from prune_lightning.tasks.presets import load_model, model_label, settled
from prune_lightning.tasks.resuming import flat_settings
from prune_lightning.tasks.setup import build_trainer, choice, quieten, run_clock, run_folder, settle_trainer, usable_by
from prune_lightning.tasks.tune_space import Space
from prune_lightning.tasks.tune_trial import Outcome, Pilots

OBJECTIVE = "harmonic mean of efficacy, paraphrase, locality and drift"
_MEMORY = 2e9  # bytes of the statistics that are computed in one pass
_LOG = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Search, and write `hparams.yaml`, `tuning.json` and a plot to the run folder.

    Raises:
        UserError: Optuna is missing, or there are too few records behind those of the stream.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("experiment=tune needs Optuna: pip install 'prune-lightning[tune]'")
    clock = run_clock()
    quieten()
    settle_trainer(config)
    if build_trainer(config, [], []).world_size > 1:
        raise UserError("experiment=tune runs in one process: use a trainer with one device")
    config = settled(config)
    check_components(config)
    folder = run_folder(resumed=bool(config.resume))
    L.seed_everything(config.seed, verbose=False)
    RunLog(clock)
    with RunProgress(clock, Console(stderr=True, quiet=not config.progress)):
        with clock.phase("load"):
            model = load_model(config)
            requests = pilot_requests(config, model, folder, clock)
        space = Space.of(config, model.num_layers)
        _keep_statistics(config, folder, model, space, clock)
        with clock.phase("tune") as phase:
            pilots = Pilots(config, model, requests, config.tune.rungs, clock)
            search = _search(config, folder, space, pilots, requests)
            phase.expect(config.tune.max_edits or 0, done=search.edits)
            while not search.over():
                _LOG.info(_line(len(search.table()), *search.step(_on_pilots(config, pilots))))
            phase.expect(phase.done)
        with clock.phase("compare") as phase:
            phase.expect(2 * config.tune.held_out)
            default, best, chosen = _compare(config, search.table(), search.finished()[0], pilots)
    _write(config, folder, pilots, search.table(), default, best, chosen)


def pilot_requests(config: DictConfig, model: LanguageModel, folder: Path, clock: PhaseClock) -> list[EditRequest]:
    """Return the pilot edits and those held out: the records of the data behind the first ``tune.skip``.

    Raises:
        UserError: There are too few.
    """
    needed = config.tune.pilots + config.tune.held_out
    skipped = config.tune.skip
    if skipped is None:
        raise UserError("experiment=tune takes its pilot edits behind the stream's: give tune.skip=N")
    stream: EditStream = instantiate(config.data, num_edits=skipped + needed)
    stream.fit(model.tokens, usable_by(config.method))
    select_records(config, stream, model, folder, clock)
    if len(found := stream.requests[skipped:]) < needed:
        raise UserError(
            f"experiment=tune needs {needed} records behind the first {skipped} (tune.skip), but the data hold "
            f"{len(found)}: lower tune.skip, tune.pilots or tune.held_out"
        )
    return found


def _keep_statistics(config: DictConfig, folder: Path, model: LanguageModel, space: Space, clock: PhaseClock) -> None:
    """Compute the second moments of all layers that a trial may edit, in as few passes as memory allows."""
    if "second_moments" not in config.method:
        return
    if config.model.second_moments.cache is None:
        config.model.second_moments.cache = str(folder / "statistics")
    layers = space.layers() or list(config.method.layers)
    size = max(1, int(_MEMORY // (8 * model.key_size(layers[0]) ** 2)))
    for start in range(0, len(layers), size):
        moments: SecondMoments = instantiate(config.method.second_moments, _convert_="all")
        moments.compute(model, layers[start : start + size], clock, config.method.get("tokens_per_feature"))


def _search(config: DictConfig, folder: Path, space: Space, pilots: Pilots, requests: list[EditRequest]) -> Any:
    from prune_lightning.tasks.tune_study import Search  # Optuna is an optional dependency

    tune = config.tune
    about = {
        "model": pilots.fingerprint,
        **_options(config, "method"),
        **_options(config, "restraint"),
        "pilots": [request.pair().text for request in requests[: tune.pilots]],
        "data.batch_size": config.data.batch_size,
        "space": [repr(parameter) for parameter in space.parameters],
        **{f"tune.{name}": tune[name] for name in ("pilots", "rungs", "startup")},
        "seed": config.seed,
    }
    seconds = None if tune.max_minutes is None else 60.0 * tune.max_minutes
    return Search(folder, space, about, config.seed, tune.startup, tune.max_edits, seconds)


def _options(config: DictConfig, group: str) -> dict[str, Any]:
    """Return the option of a group, and its settings by key, but for those of how something is computed."""
    settings: Any = OmegaConf.to_container(config[group], resolve=True) if config[group] else {}
    return {group: choice(group), **dict(flat_settings(group, settings))}


def _on_pilots(config: DictConfig, pilots: Pilots) -> Any:
    return lambda values, reached: pilots.run(values, range(config.tune.pilots), reached)


def _compare(
    config: DictConfig, trials: list[dict[str, Any]], best: Any, pilots: Pilots
) -> tuple[Outcome, Outcome, dict[str, Any]]:
    """Score the defaults and the best values on edits held out, where neither was chosen.

    Returns:
        Both outcomes, and the values of the higher score.
    """
    first, found = trials[0]["values"], best.user_attrs["values"]
    places = range(config.tune.pilots, config.tune.pilots + config.tune.held_out)
    default = pilots.run(first, places)
    if first == found:
        return default, default, first
    other = pilots.run(found, places)
    return default, other, found if other.score > default.score else first


def _line(number: int, values: Mapping[str, Any], outcome: Outcome) -> str:
    """Return one line on a trial, for the log."""
    settings = ", ".join(f"{key.partition('.')[2]} {_short(value)}" for key, value in values.items())
    terms = ", ".join(f"{name} {value:.2f}" for name, value in outcome.terms.items())
    state = outcome.failed or ("stopped early" if outcome.stopped else "")
    return f"trial {number}: score {outcome.score:.3f} after {outcome.edits} edits ({terms}) {state}: {settings}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(
    config: DictConfig,
    folder: Path,
    pilots: Pilots,
    trials: list[dict[str, Any]],
    default: Outcome,
    best: Outcome,
    chosen: Mapping[str, Any],
) -> None:
    outcome = default if chosen == trials[0]["values"] else best
    edits = sum(trial["edits"] for trial in trials)
    found = {
        "model": model_label(config),
        "fingerprint": pilots.fingerprint,
        "dtype": str(pilots.model.model.dtype),
        "method": choice("method"),
        "restraint": choice("restraint"),
        "objective": OBJECTIVE,
        "score": round(outcome.score, 4),
        "default_score": round(default.score, 4),
        "scored_on": f"{config.tune.held_out} edits of {choice('data')} that were held out",
        "terms": {name: round(value, 4) for name, value in outcome.terms.items()},
        "trials": len(trials),
        "pilot_edits": edits,
        "seed": config.seed,
        "pilots": {
            "data": choice("data"),
            "path": config.data.get("path"),
            **{name: config.tune[name] for name in ("skip", "pilots", "held_out")},
            "edits": edit_marks(pilots.requests),
        },
    }
    use = (
        f"python train.py model={choice('model')} model.path={config.model.path} method={choice('method')} hparams=FILE"
    )
    write_hparams(folder / "hparams.yaml", found, chosen, f"Hyper-parameters found by experiment=tune. Use:\n{use}")
    write_json(folder / "tuning.json", {**found, "values": dict(chosen), "all_trials": trials})
    save_plots(folder / "plots", {"tuning": plot_tuning(trials)})
    out = Console()
    table = Table("", "defaults", "best", title=f"{config.tune.held_out} edits held out", title_justify="left")
    for name in default.terms:
        table.add_row(name, f"{default.terms[name]:.3f}", f"{best.terms.get(name, 0.0):.3f}")
    table.add_row("score", f"{default.score:.3f}", f"{best.score:.3f}")
    out.print(table)
    which = "the best values" if chosen != trials[0]["values"] else "the defaults, which no trial surpassed"
    out.print(f"{len(trials)} trials, {edits} edits. {which} are in {folder / 'hparams.yaml'}", markup=False)
