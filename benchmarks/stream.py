"""Measure the time of an edit and the memory over a long stream.

python benchmarks/stream.py                                     AlphaEdit with PRUNE, 2,000 edits of the bundled model
python benchmarks/stream.py --method r_rome --edits 500 --plot FILE.png --json FILE
python benchmarks/stream.py --method ultraedit --restraint none --model smollm2 --batch-size 100 --data COUNTERFACT.json
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import psutil
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from torch.utils.data import DataLoader

from prune_lightning.data.stream import EditStream
from prune_lightning.evaluation.stream import success
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_language_model
from prune_lightning.tasks.choices import config_folder
from prune_lightning.tasks.presets import model_arguments


class Watch(L.Callback):
    """Records the time per edit, the restraint and the method's memory included, and the resident memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mebibytes: list[float] = []
        self._process = psutil.Process()
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time since the step before, by edit, and the memory."""
        now = time.perf_counter()
        self.seconds += [(now - self._last) / len(batch.requests)] * len(batch.requests)
        self.mebibytes += [self._process.memory_info().rss / 2**20] * len(batch.requests)
        self._last = now


def configured(options: argparse.Namespace) -> DictConfig:
    """Return the configuration of the main job with the options of the command line."""
    overrides = [f"{name}={getattr(options, name)}" for name in ("method", "model", "restraint")]
    overrides += ["data.protocol=sequential_batched", f"data.batch_size={options.batch_size}"]
    if options.data:
        overrides += ["data=counterfact", f"data.path='{options.data}'", "data.unique_subjects=false"]
    overrides += [f"data.num_edits={options.edits if options.data else 'null'}"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", overrides=[*overrides, *options.overrides])


def scored(module: EditingModule, data: EditStream) -> str:
    """Return how many of the first and of the last edits hold now."""
    first, last = (success(module.language_model, data.requests[part]) for part in (slice(200), slice(-200, None)))
    return ", ".join(
        f"efficacy of the {name} 200 edits {np.nanmean([float(x or 0) for x in of.score]):.3f} (exact match "
        f"{np.nanmean(of.accuracy):.3f})"
        for name, of in (("first", first), ("last", last))
    )


def draw(path: Path, watch: Watch, title: str) -> None:
    """Draw both quantities against the number of edits."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, values, label in zip(
        figure.subplots(1, 2), (watch.seconds, watch.mebibytes), ("seconds per edit", "MiB resident"), strict=True
    ):
        axes.plot(values, ".", ms=1.5)
        axes.set(xlabel="edits", title=label, ylim=(0, float(np.quantile(values, 0.995)) * 1.3))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Edit and print the means of ten parts of the stream."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="alphaedit")
    parser.add_argument("--restraint", default="prune")
    parser.add_argument("--model", default="bundled", metavar="NAME", help="a name in configs/model")
    parser.add_argument("--data", type=Path, metavar="FILE", help="CounterFact's records; default: the bundled facts")
    parser.add_argument("--edits", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--score", action="store_true", help="whether the first and the last edits hold at the end")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. method.rate=1e-4")
    options = parser.parse_args()
    config = configured(options)
    model = load_language_model(**{**model_arguments(config), "dtype": "float32"})
    data: EditStream = instantiate(config.data, _convert_="all")
    data.setup()
    data.fit(model.tokens)
    module: EditingModule = instantiate(config.method, language_model=model, _convert_="all")
    restraints = [instantiate(config.restraint, _convert_="all")] if config.get("restraint") else []
    steps = -(-options.edits // options.batch_size)
    stream = list(islice(cycle(data.batches()), steps))  # the bundled facts are fewer: they come again
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*restraints, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(stream, batch_size=None))
    print_ = Console(soft_wrap=True).print
    for name, values, digits in (("seconds per edit", watch.seconds, 4), ("MiB resident", watch.mebibytes, 0)):
        means = [round(float(np.mean(part)), digits) for part in np.array_split(values, 10)]
        print_(f"{name}, means of ten parts: {means}")
    print_(f"{len(watch.seconds)} edits, {len(watch.seconds) / sum(watch.seconds):.2f} edits per second")
    if options.score:
        print_(scored(module, data))
    if options.plot:
        restraint = "" if options.restraint == "none" else f" with {options.restraint}"
        draw(options.plot, watch, f"{options.method}{restraint}, {options.model} model")
    if options.json:
        options.json.write_text(json.dumps({"seconds": watch.seconds, "mebibytes": watch.mebibytes}))


if __name__ == "__main__":
    main()
