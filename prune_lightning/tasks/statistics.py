"""The job that computes only a model's second moments, for later runs."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from prune_lightning.callbacks import RunLog, RunProgress
from prune_lightning.errors import UserError
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.tasks.components import build, check_components
from prune_lightning.tasks.presets import load_model, settled
from prune_lightning.tasks.setup import choice, quieten, run_clock


def run(config: DictConfig) -> None:
    """Compute the statistics of the method's layers and store them in the cache."""
    quieten()
    config = settled(config)
    check_components(config)
    if "second_moments" not in config.method:
        raise UserError(f"method={choice('method')} needs no statistics; choose one that does, e.g. method=memit")
    moments: SecondMoments = build(config.model.second_moments, "model.second_moments")
    if moments.cache is None:
        raise UserError("the statistics would not be stored: give model.second_moments.cache=FOLDER")
    clock = run_clock()
    RunLog(clock)
    with RunProgress(clock, Console(stderr=True, quiet=not config.progress)):
        with clock.phase("load"):
            model = load_model(config)
        moments.compute(model, list(config.method.layers), clock, config.method.get("tokens_per_feature"))
    known = f"{moments.num_tokens} tokens, last change {moments.convergence:.1%}" if moments.num_tokens else "as before"
    Console().print(f"Second moments of layers {list(config.method.layers)}: {known}; in {moments.cache}")
