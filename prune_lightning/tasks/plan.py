"""The job that predicts memory, disk and time of a run from shapes, without loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from prune_lightning.atomic_files import write_json
from prune_lightning.costs import Changes, Cost, Machine, RestraintCost, StreamShape
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.models.loading import dtype_named, load_config, load_tokens
from prune_lightning.ranges import Positive
from prune_lightning.tasks import costs
from prune_lightning.tasks.components import build, check_components
from prune_lightning.tasks.counting import ShapeModel
from prune_lightning.tasks.machine import PlannedMachine
from prune_lightning.tasks.plan_table import print_machine, print_plan, size
from prune_lightning.tasks.presets import model_arguments, settled
from prune_lightning.tasks.setup import choice, quieten, run_folder
from prune_lightning.types import EditRequest
from prune_lightning.value_types import check_value

CHARACTERS_PER_TOKEN = 4  # if the tokenizer is not available
_UNITS = {
    "flops": ("tflops", 1e12),
    "flops64": ("tflops64", 1e12),
    "bandwidth": ("bandwidth_gb_s", 1e9),
    "overhead": ("overhead_us", 1e-6),
}
KEYS = ("memory_gb", *(key for key, _ in _UNITS.values()))


def run(config: DictConfig) -> None:
    """Predict, print, and write the figures to `plan.json`."""
    quieten()
    planned = _planned_for(config)
    config = settled(config)
    check_components(config)
    folder = run_folder()
    stream: EditStream = build(config.data, "data")
    stream.setup()
    loaded = load_config(config.model.path, config.model.revision)
    on_cpu = config.trainer.accelerator == "cpu"
    model = ShapeModel(loaded, dtype_named(config.model.dtype), model_arguments(config)["family"], on_cpu)
    needs = Needs.of(config, model, stream)
    device = torch.device("cuda" if config.trainer.accelerator == "gpu" and torch.cuda.is_available() else "cpu")
    memory = {"libraries": planned.libraries(device)}  # before the others are used
    machine = _speed(config, planned, model, needs, device)
    host = needs.host()
    memory |= needs.memory()
    if on_cpu:  # the device's memory is the CPU's
        memory, host = memory | host, {}
    disk, seconds, once = needs.disk(), needs.seconds(machine), machine.seconds(needs.cost.once)
    free = {
        "memory": _given(config, "memory_gb", planned.memory(device)),
        "disk": _given(config, "disk_gb", planned.free_disk(folder)),
        "memory of the CPU": _given(config, "cpu_memory_gb", planned.host_memory()),
    }
    needed = {"memory": memory, "disk": disk, "memory of the CPU": host}
    problems = misfits({kind: sum(parts.values()) for kind, parts in needed.items()}, free)
    if needs.cost.unknown:
        problems.append(f"method={choice('method')} has no cost estimate; its own computations are not included")
    rows = f"Rows of {needs.cost.length} tokens ({needs.counted}). Evaluations come on top."
    keys = {"disk": "disk_gb", "memory of the CPU": "cpu_memory_gb"}
    if unknown := [kind for kind in keys if needed[kind] and free[kind] is None]:
        listed = ", ".join(f"{kind} (plan.{keys[kind]}=... says how much there is)" for kind in unknown)
        rows += f" Not compared with what the machine has: {listed}."
    print_plan(memory, host, disk, seconds, once, needs.stream, rows, problems)
    print_machine(planned.name, machine, planned.range_of_error)
    plan = {
        "memory_bytes": memory,
        "cpu_memory_bytes": host,
        "disk_bytes": disk,
        "seconds_per_edit": seconds,
        "seconds_before_the_first_edit": once,
        "seconds_of_edits": sum(seconds.values()) * needs.stream.edits,
        "stream": asdict(needs.stream),
        "matrices": [list(shape) for shape in needs.cost.matrices],
        "machine": {"name": planned.name, **asdict(machine)},
        "range_of_error": planned.range_of_error,
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
        restrained = config.restraint and cost.matrices
        restraint = build(config.restraint, "restraint").cost(kept) if restrained else RestraintCost()
        return cls(model, shape, cost, restraint, kept, counted)

    def memory(self) -> dict[str, float]:
        """Return bytes on the device, by purpose."""
        weights = float(self.model.weight_bytes)
        return costs.memory(weights, self.cost, self.restraint, self.kept, self.model.weight_size)

    def host(self) -> dict[str, float]:
        """Return bytes in the CPU's memory, by purpose; they are also needed if the device is a GPU."""
        return costs.host(self.cost, self.kept)

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
    try:
        tokenizer: Any = load_tokens(config.model.path, config.model.revision).tokenizer
    except UserError:
        tokenizer = None

    def count(text: str) -> float:
        return len(tokenizer(text)["input_ids"]) if tokenizer else max(1.0, len(text) / CHARACTERS_PER_TOKEN)

    means = [sum(count(row[column]) for row in texts) / len(texts) for column in range(3)]
    how = (
        "the model's tokenizer" if tokenizer else f"{CHARACTERS_PER_TOKEN} characters a token, for want of a tokenizer"
    )
    return means[0], means[1], means[2], how


def _planned_for(config: DictConfig) -> PlannedMachine:
    """Return the machine to plan for; its accelerator becomes the Trainer's, on which the dtype depends.

    Raises:
        UserError: It is this machine with a GPU that is not there, and not all of its figures are given.
    """
    for key in (*KEYS, "cpu_memory_gb", "disk_gb"):
        check_value(f"plan.{key}", config.plan[key], Positive | None)
    planned: PlannedMachine = build(config.machine, "machine")
    if planned.accelerator is not None:
        config.trainer.accelerator = planned.accelerator
    elif config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        open_figures = [name for name in KEYS if config.plan.get(name) is None]
        if open_figures:
            raise UserError(
                "there is no GPU here to measure: choose a machine (machine=h100), or give "
                + ", ".join(f"plan.{name}=..." for name in open_figures)
            )
    return planned


def _speed(
    config: DictConfig, planned: PlannedMachine, model: ShapeModel, needs: Needs, device: torch.device
) -> Machine:
    """Return the machine's speed, with the figures that the configuration sets; nothing is measured if it sets all."""
    given = {name: config.plan.get(key) for name, (key, _) in _UNITS.items()}
    found = {name: value * _UNITS[name][1] for name, value in given.items() if value is not None}
    if len(found) < len(_UNITS):
        out, inner = (needs.cost.matrices or [model.edited_shape(model.num_layers - 1)])[-1]
        own = asdict(planned.speed(device, model.dtype, (max(1, needs.cost.length), inner, out)))
        found = own | found
    return Machine(**found)


def _given(config: DictConfig, key: str, own: float | None) -> float | None:
    """Return the bytes that the configuration gives in units of 10^9, or else the machine's own."""
    value = config.plan[key]
    return own if value is None else value * 1e9


def misfits(needed: Mapping[str, float], free: Mapping[str, float | None]) -> list[str]:
    """Return one sentence for each need that does not fit.

    Args:
        needed: Bytes, by what they are taken from.
        free: Its free bytes; ``None`` if they are not known.
    """
    return [
        f"{kind}: {size(bytes_)} are needed, {size(there)} are free"
        for kind, bytes_ in needed.items()
        if (there := free[kind]) is not None and bytes_ > there
    ]
