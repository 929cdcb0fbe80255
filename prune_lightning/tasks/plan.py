"""The job that predicts memory, disk and time of a run from shapes, without loading weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from prune_lightning.atomic_files import write_json
from prune_lightning.costs import Changes, Cost, Machine, RestraintCost, StreamShape
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.models.loading import dtype_named, load_config, located
from prune_lightning.tasks import costs
from prune_lightning.tasks.components import build, check_components
from prune_lightning.tasks.counting import ShapeModel
from prune_lightning.tasks.machine import free_memory, measure, resident
from prune_lightning.tasks.presets import model_arguments, settled
from prune_lightning.tasks.setup import choice, quieten, run_folder
from prune_lightning.types import EditRequest

CHARACTERS_PER_TOKEN = 4  # if the tokenizer is not available
_CUDA_CONTEXT = 0.6e9


def run(config: DictConfig) -> None:
    """Predict, print, and write the figures to `plan.json`."""
    quieten()
    config = settled(config)
    check_components(config)
    folder = run_folder()
    libraries = resident()
    stream: EditStream = build(config.data, "data")
    stream.setup()
    loaded = load_config(config.model.path, config.model.revision)
    model = ShapeModel(loaded, dtype_named(config.model.dtype), model_arguments(config)["family"])
    needs = Needs.of(config, model, stream)
    device = torch.device("cuda" if config.trainer.accelerator == "gpu" and torch.cuda.is_available() else "cpu")
    machine = _machine(config, model, needs, device)
    memory = {"libraries": _CUDA_CONTEXT if config.trainer.accelerator == "gpu" else libraries}
    memory |= needs.memory()
    disk, seconds, once = needs.disk(), needs.seconds(machine), machine.seconds(needs.cost.once)
    problems = misfits(config, sum(memory.values()), sum(disk.values()), device, folder)
    if needs.cost.unknown:
        problems.append(f"method={choice('method')} has no cost estimate; its own computations are not included")
    _print(memory, disk, seconds, once, needs, problems)
    plan = {
        "memory_bytes": memory,
        "disk_bytes": disk,
        "seconds_per_edit": seconds,
        "seconds_before_the_first_edit": once,
        "seconds_of_edits": sum(seconds.values()) * needs.stream.edits,
        "stream": asdict(needs.stream),
        "matrices": [list(shape) for shape in needs.cost.matrices],
        "machine": asdict(machine),
        "token_counts": needs.counted,
        "does_not_fit": problems,
    }
    write_json(folder / "plan.json", plan)


@dataclass(frozen=True)
class Needs:
    """The needs of the parts of a run.

    Args:
        model: The model's shapes.
        stream: The stream's.
        cost: Cost of the method.
        restraint: Cost of the restraint.
        kept: The accumulated changes.
        counted: Source of the token counts.
    """

    model: ShapeModel
    stream: StreamShape
    cost: Cost
    restraint: RestraintCost
    kept: Changes
    counted: str

    @classmethod
    def of(cls, config: DictConfig, model: ShapeModel, stream: EditStream) -> Needs:
        """Return the needs of a configuration's method and restraint.

        Raises:
            UserError: A layer is outside the model.
        """
        for layer in config.method.layers or ():
            if not 0 <= layer < model.num_layers:
                raise UserError(f"layer {layer} is outside the model's layers 0 to {model.num_layers - 1}")
        prompt, target, subject_end, counted = _token_counts(config, stream.requests)
        shape = StreamShape(len(stream.requests), stream.batch_size, prompt, subject_end, target)
        method = instantiate(config.method, _partial_=True, _convert_="all")
        cost = costs.method_cost(method.func, model, shape, method.keywords)
        kept = costs.changes(cost, model, shape)
        restraint = build(config.restraint, "restraint").cost(kept) if config.restraint else RestraintCost()
        return cls(model, shape, cost, restraint, kept, counted)

    def memory(self) -> dict[str, float]:
        """Return bytes on the device, by purpose."""
        weights = float(self.model.weight_bytes)
        return costs.memory(weights, self.cost, self.restraint, self.kept, self.model.weight_size)

    def disk(self) -> dict[str, float]:
        """Return bytes on disk."""
        return costs.disk(self.cost, self.stream, self.kept)

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Return seconds per edit, by purpose."""
        return costs.time(self.cost, self.restraint, self.stream, self.kept, machine)


def _token_counts(config: DictConfig, requests: list[EditRequest]) -> tuple[float, float, float, str]:
    """Return mean tokens of prompts, of targets, and of prompts up to the subject's end, and how they were counted."""
    pairs = [(request.pair(), request.behind("")[1]) for request in requests[:200]]
    texts = [(pair.context, pair.continuation, pair.context[:end]) for pair, end in pairs]
    name, local = located(config.model.path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=config.model.revision, local_files_only=local)
    except (OSError, ValueError):
        tokenizer = None

    def count(text: str) -> float:
        return len(tokenizer(text)["input_ids"]) if tokenizer else max(1.0, len(text) / CHARACTERS_PER_TOKEN)

    means = [sum(count(row[column]) for row in texts) / len(texts) for column in range(3)]
    how = (
        "the model's tokenizer" if tokenizer else f"{CHARACTERS_PER_TOKEN} characters a token, for want of a tokenizer"
    )
    return means[0], means[1], means[2], how


def _machine(config: DictConfig, model: ShapeModel, needs: Needs, device: torch.device) -> Machine:
    out, inner = needs.cost.matrices[-1]
    measured = measure(device, model.dtype, (max(1, needs.cost.length), inner, out))
    given = config.plan.tflops
    if given is None:
        return measured
    return Machine(given * 1e12, measured.flops64, measured.bandwidth, measured.overhead)


def misfits(config: DictConfig, memory: float, disk: float, device: torch.device, folder: Path) -> list[str]:
    """Return one sentence for each need that does not fit."""
    problems = []
    available = free_memory(device) if config.plan.memory_gb is None else config.plan.memory_gb * 1e9
    elsewhere = config.trainer.accelerator == "gpu" and device.type == "cpu" and config.plan.memory_gb is None
    if elsewhere:
        problems.append("no GPU here: the memory was not compared with anything (plan.memory_gb=80 gives a size)")
    elif memory > available:
        problems.append(f"memory: {_size(memory)} are needed, {_size(available)} are free")
    free = shutil.disk_usage(folder).free
    if disk > free:
        problems.append(f"disk: {_size(disk)} are needed, {_size(free)} are free at {folder}")
    return problems


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _print(
    memory: Mapping[str, float],
    disk: Mapping[str, float],
    seconds: Mapping[str, float],
    once: float,
    needs: Needs,
    problems: list[str],
) -> None:
    out = Console()
    table = Table(title=f"Plan: {needs.stream.edits} edits, {needs.stream.batch} at a time", title_justify="left")
    table.add_column("")
    table.add_column("predicted", justify="right")
    for title, parts, text in (
        ("memory, peak", memory, _size),
        ("disk", disk, _size),
        ("time per edit", seconds, _span),
    ):
        table.add_row(f"[bold]{title}[/bold]", f"[bold]{text(sum(parts.values()))}[/bold]")
        for name, amount in parts.items():
            table.add_row(f"  {name}", text(amount))
    table.add_row("[bold]all edits[/bold]", _span(sum(seconds.values()) * needs.stream.edits))
    if once:
        table.add_row("[bold]statistics, at most, if not kept yet[/bold]", _span(once))
    out.print(table)
    out.print(f"Rows of {needs.cost.length} tokens ({needs.counted}). Evaluations come on top.", highlight=False)
    for problem in problems or ["Everything fits."]:
        out.print(problem, markup=False, highlight=False)
