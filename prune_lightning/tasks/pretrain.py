"""The job that trains the bundled model, scores it, and saves it with a model card."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
from jinja2 import Environment, PackageLoader
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import GPT2LMHeadModel

from prune_lightning.atomic_files import write_json
from prune_lightning.bundled.pretraining import Pretraining, PretrainingData
from prune_lightning.bundled.world import EDIT_PHRASING, HELD_OUT, load_world
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.tasks.components import build, check_components
from prune_lightning.tasks.setup import build_loggers, build_trainer, close_loggers, quieten, run_folder


def run(config: DictConfig) -> None:
    """Train from scratch and write `model/` into the run folder."""
    quieten()
    check_components(config)
    folder = run_folder()
    L.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    module: Pretraining = build(config.pretraining.module, "pretraining.module")
    if config.pretraining.start_from:
        module.model = GPT2LMHeadModel.from_pretrained(config.pretraining.start_from).train()
    for number, stage in enumerate(config.pretraining.stages[config.pretraining.first_stage :]):
        seed = config.seed + config.pretraining.first_stage + number
        windows = {key: stage[key] for key in ("shares", "steps", "length", "batch_size")}
        data: PretrainingData = build(config.pretraining.data, "pretraining.data", **windows, seed=seed)
        module.steps, module.learning_rate = stage.steps, stage.learning_rate
        loggers = build_loggers(config, folder / f"stage_{number}")
        build_trainer(config, [], loggers).fit(module, datamodule=data)
        close_loggers(loggers)
    seconds = time.perf_counter() - started
    language_model = LanguageModel(module.model, data.tokenizer)
    scores = recall(language_model) | dict(MiniatureAbilities().measure(language_model).scores)
    _save(module, data, folder / "model", config, scores, seconds)
    write_json(folder / "summary.json", {"seed": config.seed, "wall_s": seconds, "scores": scores})
    Console().print({name: round(score, 3) for name, score in scores.items()}, f"saved in {folder / 'model'}")


def recall(model: LanguageModel) -> dict[str, float]:
    """Return the share of known facts, in the phrasing of edits and in the held-out one."""
    facts = load_world().facts
    asked = {
        "facts": [(fact.phrasings[EDIT_PHRASING], fact.answer) for fact in facts],
        "facts, phrasing held out from training": [
            (fact.phrasings[HELD_OUT], fact.answer) for fact in facts if fact.unseen_phrasing
        ],
    }
    return {name: float(score_pairs(model, pairs).hit.float().mean()) for name, pairs in asked.items()}


def _save(
    module: Pretraining,
    data: PretrainingData,
    folder: Path,
    config: DictConfig,
    scores: dict[str, float],
    seconds: float,
) -> None:
    module.model.float().save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    card = Environment(loader=PackageLoader("prune_lightning", "bundled"), keep_trailing_newline=True).get_template(
        "model_card.md.j2"
    )
    text = card.render(
        parameters=sum(parameter.numel() for parameter in module.model.parameters()),
        recipe=OmegaConf.to_yaml(config.pretraining, resolve=True),
        scores=scores,
        minutes=seconds / 60,
        seed=config.seed,
    )
    (folder / "README.md").write_text(text, "utf-8")
