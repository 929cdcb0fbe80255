"""Measure the time of an edit and the memory over a long stream on the bundled model.

python benchmarks/stream.py                                     AlphaEdit with PRUNE, 2,000 edits
python benchmarks/stream.py --method r_rome --edits 500 --plot FILE.png --json FILE
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from rich.console import Console

from prune_lightning.callbacks import PRUNE
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditBatch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Watch(L.Callback):
    """Records time and resident memory after every edit, including the restraint."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mebibytes: list[float] = []
        self._process = psutil.Process()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Note them."""
        self.seconds.append(pl_module.run.last_report.seconds)
        self.mebibytes.append(self._process.memory_info().rss / 2**20)


def build(method: str) -> EditingModule:
    """Return a method with the settings of the main job."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"method={method}"])
    model = load_language_model(config.model.path)
    module: EditingModule = hydra.utils.instantiate(config.method, language_model=model, _convert_="all")
    return module


def main() -> None:
    """Edit and print the means of ten parts of the stream."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="alphaedit")
    parser.add_argument("--edits", type=int, default=2000)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    world = BundledWorld()
    world.setup()
    stream: list[EditBatch] = list(islice(cycle(world.batches()), options.edits))
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[PRUNE(base=1.2), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(build(options.method), torch.utils.data.DataLoader(stream, batch_size=None))
    for name, values, digits in (("seconds per edit", watch.seconds, 4), ("MiB resident", watch.mebibytes, 0)):
        means = [round(float(np.mean(part)), digits) for part in np.array_split(values, 10)]
        Console().print(f"{name}, means of ten parts: {means}")
    if options.plot:
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for axes, values, label in zip(
            figure.subplots(1, 2), (watch.seconds, watch.mebibytes), ("seconds per edit", "MiB resident"), strict=True
        ):
            axes.plot(values, ".", ms=1.5)
            axes.set(xlabel="edits", title=label, ylim=(0, float(np.quantile(values, 0.995)) * 1.3))
            axes.grid(alpha=0.3)
        figure.suptitle(f"{options.method} with PRUNE, bundled model")
        figure.savefig(options.plot, dpi=120)
    if options.json:
        options.json.write_text(json.dumps({"seconds": watch.seconds, "mebibytes": watch.mebibytes}))


if __name__ == "__main__":
    main()
