"""The job that trains MEND's network for a model, for later edits."""

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
from prune_lightning.methods.mend import MEND
from prune_lightning.methods.mend_store import save_network
from prune_lightning.methods.mend_training import MENDTraining
from prune_lightning.tasks.components import build, check_components
from prune_lightning.tasks.presets import load_model, model_label, settled
from prune_lightning.tasks.setup import build_loggers, build_trainer, close_loggers, quieten, run_folder


def run(config: DictConfig) -> None:
    """Train, and write the best network to `hypernetwork/` in the run folder."""
    quieten()
    config = settled(config)
    check_components(config)
    folder, settings = run_folder(), config.mend_training
    L.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    data: EditorTrainingData = build(config.editor_data, "editor_data")
    model = load_model(config)
    data.fit(model.tokens)
    editor: MEND = build(config.method, "method", language_model=model, hypernetwork=None)
    module = MENDTraining(model, editor.edited_modules(), editor.layers[0], editor.network, editor.options)
    best = ModelCheckpoint(
        folder / "checkpoints", "best", "val/loss", save_last=True, save_on_train_epoch_end=True, mode="min"
    )
    stop = EarlyStopping("val/loss", patience=settings.patience, mode="min")
    trainer = build_trainer(config, [best, stop], build_loggers(config, folder))
    if trainer.world_size > 1:
        raise UserError("MEND's network is trained by one process; give trainer.devices=1")
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
    save_network(folder / "hypernetwork", module.network, editor.edited_modules(), facts, _dtype(settings.dtype))
    write_json(folder / "summary.json", {**facts, "wall_s": time.perf_counter() - started})
    rounded = {name: round(score, 3) for name, score in scores.items()}
    Console().print(rounded, f"\nThe best network: method=mend method.hypernetwork={folder / 'hypernetwork'}")


def _checkpoint(path: str | None) -> str | None:
    if path is not None and not Path(path).is_file():
        raise UserError(f"mend_training.resume: no file {path!r}; a run leaves checkpoints/last.ckpt in its folder")
    return path


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"mend_training.dtype is float32 or float16, but got {name!r}")
    return dtypes[name]
