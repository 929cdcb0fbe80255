"""The job that predicts memory, disk and time of a run from shapes alone; no weight is loaded."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from prune_lightning.atomic_files import write_json
from prune_lightning.callbacks import SpectralRestraint
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.methods.layerwise import LayerwiseEdit
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.loading import dtype_named, load_config, located
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.tasks import costs
from prune_lightning.tasks.costs import Machine, Setting
from prune_lightning.tasks.counting import ShapeModel
from prune_lightning.tasks.machine import free_memory, measure, resident
from prune_lightning.tasks.setup import quieten, run_folder
from prune_lightning.types import EditRequest

CHARACTERS_PER_TOKEN = 4  # where the tokenizer is not at hand
_CUDA_CONTEXT = 0.6e9


def run(config: DictConfig) -> None:
    """Predict, print, and leave the figures in `plan.json`."""
    quieten()
    folder = run_folder()
    libraries = resident()
    stream: EditStream = instantiate(config.data)
    stream.setup()
    model = ShapeModel(load_config(config.model.path, config.model.revision), dtype_named(config.model.dtype))
    setting, counted = settings(config, model, stream)
    device = torch.device("cuda" if config.trainer.accelerator == "gpu" and torch.cuda.is_available() else "cpu")
    machine = _machine(config, model, setting, device)
    memory = {"libraries": _CUDA_CONTEXT if config.trainer.accelerator == "gpu" else libraries}
    memory |= costs.memory(model, setting)
    disk = costs.disk(model, setting)
    seconds = costs.time(model, setting, machine)
    once = costs.statistics_time(model, setting, machine)
    problems = misfits(config, sum(memory.values()), sum(disk.values()), device, folder)
    _print(memory, disk, seconds, once, setting, problems, counted)
    plan = {
        "memory_bytes": memory,
        "disk_bytes": disk,
        "seconds_per_edit": seconds,
        "seconds_of_statistics": once,
        "seconds_of_edits": sum(seconds.values()) * setting.edits,
        "setting": asdict(setting),
        "machine": asdict(machine),
        "token_counts": counted,
        "does_not_fit": problems,
    }
    write_json(folder / "plan.json", plan)


def settings(config: DictConfig, model: ShapeModel, stream: EditStream) -> tuple[Setting, str]:
    """Return what of a configuration its costs depend on, and where the token counts come from.

    Raises:
        UserError: The method is not of the locate-and-edit family, whose costs are known here.
    """
    method, moments = config.method, config.model.second_moments
    kind = get_class(method._target_)
    if not issubclass(kind, LocateThenEdit):
        raise UserError(f"the plan knows what locate-and-edit methods cost, but not {kind.__name__}")
    for layer in method.layers:
        if not 0 <= layer < model.num_layers:
            raise UserError(f"layer {layer} is outside the model's layers 0 to {model.num_layers - 1}")
    value: ValueOptions = instantiate(method.value)
    lengths = [(0, 1), *((size, count) for size, count in method.contexts.get("lengths") or ())]
    prompt, target, until, counted = _token_counts(config, stream.requests)
    longest_prefix = max(size for size, _ in lengths) + 2
    null_space = "null_threshold" in method
    restraint = get_class(config.restraint._target_) if config.restraint else None
    defaults = SecondMoments(None)
    longest = min(
        moments.get("max_length", defaults.max_length),
        getattr(model.config, "max_position_embeddings", None) or defaults.max_length,
    )
    samples = moments.corpus.samples if moments.corpus else 0
    return Setting(
        layers=tuple(method.layers),
        edits=len(stream.requests),
        batch=stream.batch_size,
        one_by_one=not issubclass(kind, LayerwiseEdit),
        prefixes=sum(count for _, count in lengths),
        length=math.ceil(longest_prefix + prompt + target - 1),
        after=math.ceil(prompt - until + target),
        target=math.ceil(target),
        steps=value.steps,
        token_budget=value.token_budget,
        past_keys=null_space or bool(method.get("accumulate_past_keys")),
        null_space=null_space,
        restraint="none"
        if restraint is None
        else "factors"
        if isinstance(restraint, type) and issubclass(restraint, SpectralRestraint)
        else "dense",
        corpus_tokens=min(samples * longest, moments.get("max_tokens") or samples * longest),
        corpus_length=longest,
        corpus_batch=moments.get("token_budget", defaults.token_budget),
        keeps_statistics=bool(moments.get("cache")),
    ), counted


def _token_counts(config: DictConfig, requests: list[EditRequest]) -> tuple[float, float, float, str]:
    """Return mean tokens of prompts, targets, and prompts up to the subject's end, and how they were counted."""
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


def _machine(config: DictConfig, model: ShapeModel, setting: Setting, device: torch.device) -> Machine:
    out, inner = model.edited_shape(setting.layers[-1])
    measured = measure(device, model.dtype, (setting.rows * setting.after, inner, out))
    given = config.plan.tflops
    if given is None:
        return measured
    return Machine(given * 1e12, measured.flops64, measured.bandwidth, measured.overhead)


def misfits(config: DictConfig, memory: float, disk: float, device: torch.device, folder: Path) -> list[str]:
    """Return what would not fit, a sentence each."""
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
    setting: Setting,
    problems: list[str],
    counted: str,
) -> None:
    out = Console()
    table = Table(title=f"Plan: {setting.edits} edits, {setting.batch} at a time", title_justify="left")
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
    table.add_row("[bold]all edits[/bold]", _span(sum(seconds.values()) * setting.edits))
    table.add_row("[bold]statistics, at most, if not kept yet[/bold]", _span(once))
    out.print(table)
    out.print(f"Rows of {setting.length} tokens ({counted}). Evaluations come on top.", highlight=False)
    for problem in problems or ["Everything fits."]:
        out.print(problem, markup=False, highlight=False)
