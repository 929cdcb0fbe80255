"""The job that trains the networks of an editor for a model, for later edits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from prune_lightning.atomic_files import write_json
from prune_lightning.data.editor_training import EditorTrainingData
from prune_lightning.errors import UserError
from prune_lightning.methods.editor_training import TrainedEditor
from prune_lightning.tasks.components import build, check_components, located
from prune_lightning.tasks.presets import load_model, model_label, settled
from prune_lightning.tasks.setup import build_loggers, build_trainer, choice, close_loggers, quieten, run_folder


def run(config: DictConfig) -> None:
    """Train, and write the best networks to a folder in the run folder, such as `hypernetwork/` of MEND."""
    quieten()
    config = settled(config)
    check_components(config)
    kind = located(config.method._target_, "method._target_")
    if not (isinstance(kind, type) and issubclass(kind, TrainedEditor)):
        raise UserError(f"method={choice('method')} has no networks to train before the edits")
    folder, settings, store = run_folder(), config.editor_training, kind.store
    L.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    data: EditorTrainingData = build(config.editor_data, "editor_data")
    model = load_model(config)
    data.fit(model.tokens)
    editor = build(config.method, "method", language_model=model, **{store.option.removeprefix("method."): None})
    module = editor.training_module()
    best = ModelCheckpoint(
        folder / "checkpoints", "best", "val/loss", save_last=True, save_on_train_epoch_end=True, mode="min"
    )
    stop = EarlyStopping("val/loss", patience=settings.patience, mode="min")
    trainer = build_trainer(config, [best, stop], build_loggers(config, folder))
    if trainer.world_size > 1:
        raise UserError("an editor is trained by one process; give trainer.devices=1")
    trainer.fit(module, datamodule=data, ckpt_path=_checkpoint(settings.resume))
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"], strict=False)
    (scores,) = trainer.validate(module, datamodule=data, verbose=False)
    close_loggers(trainer.loggers)
    facts: dict[str, Any] = {
        "model": model_label(config),
        "seed": config.seed,
        "optimizer_steps": trainer.global_step,
        "scores": scores,
        "method": OmegaConf.to_container(config.method, resolve=True),
        "editor_data": OmegaConf.to_container(config.editor_data, resolve=True),
    }
    trained = folder / store.name
    editor.save_trained(trained, facts, _dtype(settings.dtype))
    write_json(folder / "summary.json", {**facts, "wall_s": time.perf_counter() - started})
    rounded = {name: round(score, 3) for name, score in scores.items()}
    Console().print(rounded, f"\nThe best: method={choice('method')} {store.option}={trained}")


def _checkpoint(path: str | None) -> str | None:
    if path is not None and not Path(path).is_file():
        raise UserError(f"editor_training.resume: no file {path!r}; a run leaves checkpoints/last.ckpt in its folder")
    return path


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"editor_training.dtype is float32 or float16, but got {name!r}")
    return dtypes[name]
