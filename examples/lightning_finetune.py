"""Fine-tune the bundled model on a narrow text with a high learning rate, with and without PRUNE.

    python examples/lightning_finetune.py
    python examples/lightning_finetune.py --plot FILE.png

Prints and plots the loss on the text, the retention of abilities, and held-out perplexity.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from prune_lightning.callbacks import PRUNE
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.evaluation.scoring import token_nll
from prune_lightning.metrics.functional import retention
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model

TEXT = (Path(__file__).parent / "lighthouse.txt").read_text().splitlines()


class FineTuning(L.LightningModule):
    """Plain next-token training of one matrix, the down-projection of block 1; it is independent of PRUNE."""

    def __init__(self, language_model: LanguageModel, learning_rate: float) -> None:
        super().__init__()
        self.language_model, self.learning_rate = language_model, learning_rate
        language_model.rewrite_module(1).weight.requires_grad_(True)

    def training_step(self, batch: list[str], batch_idx: int) -> torch.Tensor:
        tokens = self.language_model.tokens
        ids, mask = tokens.pad([tokens.encode(text) for text in batch], self.device)
        loss: torch.Tensor = self.language_model.model(
            input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
        ).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


class Measure(L.Callback):
    """Measures the model before training and every ten steps."""

    def __init__(self, items: int) -> None:
        self.abilities = MiniatureAbilities(max_items=items)
        self.curve: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % 10 == 0:
            self._look(trainer, pl_module)

    @torch.no_grad()
    def _look(self, trainer: L.Trainer, module: Any) -> None:
        model = module.language_model
        nll, count = token_nll(model, TEXT)
        scores = self.abilities.measure(model).scores
        before = self.curve[0] if self.curve else scores
        scores["retention"] = retention(scores, before, self.abilities.tasks)
        scores["loss on the text"] = float(nll.sum() / count.sum())
        self.curve.append({"step": trainer.global_step, **scores})


def train(steps: int, learning_rate: float, items: int, *callbacks: L.Callback) -> list[dict[str, float]]:
    """Fine-tune a new copy of the bundled model and return its measurements."""
    L.seed_everything(0, verbose=False)
    model = load_language_model("pkg://prune_lightning.bundled/model")
    measure = Measure(items)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(FineTuning(model, learning_rate), torch.utils.data.DataLoader(TEXT, batch_size=5, shuffle=True))
    return measure.curve


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot the measurements over the steps."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 3), ("loss on the text", "retention", "perplexity"), strict=True):
        for (label, curve), style in zip(curves.items(), ("C3--", "C0-"), strict=True):
            axes.plot([entry["step"] for entry in curve], [entry[key] for entry in curve], style, label=label)
        axes.set(xlabel="steps", title="held-out perplexity" if key == "perplexity" else key)
        axes.set_yscale("log" if key == "perplexity" else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--items", type=int, default=150, help="items per ability")
    parser.add_argument("--base", type=float, default=10.0, help="PRUNE's base")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    common = options.steps, options.learning_rate, options.items
    curves = {
        "fine-tuning alone": train(*common),
        "with PRUNE": train(*common, PRUNE(options.base)),
    }
    table = Table("", "before", *curves)
    for key in next(iter(curves.values()))[0]:
        before, *after = (f"{entry[key]:.3f}" for entry in (curves["with PRUNE"][0], *(c[-1] for c in curves.values())))
        table.add_row(key, before, *after)
    Console().print(table)
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
