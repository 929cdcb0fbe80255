"""Time edits with ROME and MEMIT by the plain and the fast path, on a model with random weights.

    python benchmarks/editing.py                          GPT-2's 124M shape on the CPU
    python benchmarks/editing.py --shape llama-3-8b --dtype bfloat16 --device cuda
    python benchmarks/editing.py --model smollm2          real weights, at the layers of configs/model/smollm2.yaml
    python benchmarks/editing.py --methods memit --batch-sizes 1 --json FILE --trace TRACE.json.gz

The plain path costs what the public code costs: each value is optimised alone, every step runs the whole model on all
rows of the request and computes all logits, without gradients of weights (``tests/plain_values.py``). Per edited layer,
keys need a whole forward pass of all rows, and hidden states one of the clean prompts. There is no early stopping, and
20 steps each by default. Both paths run for a few steps before they are timed. The plain path is timed on the first
requests only, since it processes them one by one, and its values are compared. Another run, with PRUNE and the scores
of the requests before and after, gives the shares of the parts; on a GPU it waits at the ends of each. Of large batches
it is the only one. A method that optimises no values (UltraEdit) has no plain path here.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, random_model
from timing import PeakMemory, Shares, clock
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from prune_lightning.callbacks import PRUNE
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.evaluation import stream as scores
from prune_lightning.methods import ultraedit
from prune_lightning.methods.alphaedit import AlphaEdit
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.layerwise_keys import LayerwiseKeyReader
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.prompts import target_row
from prune_lightning.methods.rome import ROME
from prune_lightning.methods.value import ValueOptions
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoment, SecondMoments
from prune_lightning.tasks.choices import config_folder
from prune_lightning.types import EditRequest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from plain_values import plain_value

LAYERS = {
    "gpt2": {"single": [5], "window": [3, 4, 5, 6, 7]},
    "toy": {"single": [1], "window": [1, 2, 3]},
    "llama-2-7b": {"single": [5], "window": [4, 5, 6, 7, 8]},
    "llama-3-8b": {"single": [5], "window": [4, 5, 6, 7, 8]},
}
LARGE = 32  # requests of a batch
WORDS = ("The", "river", "runs", "slowly", "through", "an", "old", "town", "where", "nobody", "has", "lived", "for")


def prefixes(count: int) -> list[str]:
    """Return prefixes, one half with five words and one half with ten."""
    words = itertools.cycle(WORDS)
    return [" ".join(itertools.islice(words, 5 if i < count // 2 else 10)) + ". " for i in range(count)]


class RandomMoments(SecondMoments):
    """Positive definite moments of low rank and the identity, without a corpus: values do not change an edit's time."""

    def compute(self, model: LanguageModel, layers: Sequence[int], *others: Any) -> dict[int, SecondMoment]:
        """Return them."""
        return {layer: SecondMoment(self.matrix(model.key_size(layer), model.device)) for layer in layers}

    @staticmethod
    def matrix(size: int, device: torch.device) -> Tensor:
        """Return one."""
        factor = torch.randn(size, max(1, size // 32), device=device)
        return (factor @ factor.T).double() / len(factor) + torch.eye(size, dtype=torch.float64, device=device)


class CheapAlphaEdit(AlphaEdit):
    """AlphaEdit without the decomposition that :meth:`prepare` needs once: a random null space."""

    def prepare(self) -> None:
        """Prepare as the base does, but find no null space."""
        super(AlphaEdit, self).prepare()
        self.forget()

    def unprotected_inverse(self, layer: int) -> Tensor:
        """Return the projector onto a random space's complement, divided by the ridge."""
        size = self.language_model.key_size(layer)
        known = torch.linalg.qr(torch.randn(size, size // 8, dtype=torch.float64, device=self.device))[0]
        inverse = torch.addmm(torch.eye(size, dtype=torch.float64, device=self.device), known, known.T, alpha=-1)
        return inverse.div_(self.ridge)


CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "method"


def known(method: str) -> bool:
    """Whether there is a method of this name."""
    return (CONFIGS / f"{method}.yaml").exists()


def preset(name: str) -> Any:
    """Return the settings of an option of ``configs/model``."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", overrides=[f"model={name}"]).model


def layers_of(name: str) -> Mapping[str, Sequence[int]]:
    """Return the edited layers of a shape, or of an option of ``configs/model``, by purpose."""
    return LAYERS[name] if name in LAYERS else preset(name).edit.layers


def load(options: argparse.Namespace) -> LanguageModel:
    """Return the model."""
    if options.model is None:
        return random_model(options.shape, getattr(torch, options.dtype), torch.device(options.device))
    chosen = preset(options.model)
    return load_language_model(chosen.path, options.dtype, chosen.revision).to(options.device)


def build(method: str, model: LanguageModel, shape: str, steps: int = 20, graph: bool = False) -> EditingModule:
    """Return a method with random statistics; one that needs none is built from its YAML."""
    layers = layers_of(shape)["single" if method == "rome" else "window"]
    kinds = {"rome": (ROME, {}), "memit": (MEMIT, {"ridge": 15000}), "alphaedit": (CheapAlphaEdit, {})}
    if method not in kinds:
        settings = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{method}.yaml"), {"layers": layers})
        module: EditingModule = instantiate(settings, language_model=model, _convert_="all").to(model.device)
        module.prepare()
        return module
    single = method == "rome"
    shared: dict[str, Any] = {
        "language_model": model,
        "layers": layers,
        "second_moments": RandomMoments(None),
        "value": ValueOptions(steps=steps, stop_loss=0.0, clamp=4.0 if single else 0.75, graph=graph),
        "contexts": ContextOptions(fixed=prefixes(20 if single else 5)),
    }
    kind, options = kinds[method]
    module = kind(**shared, **options).to(model.device)
    module.prepare()
    return module


def site_of(module: LocateThenEdit) -> ShiftSite:
    """Return where a method's values enter."""
    return ShiftSite(module.layers[-1], "mlp" if isinstance(module, ROME) else "block")


def shares(module: EditingModule, batch: list[EditRequest], device: torch.device) -> dict[str, float]:
    """Return the share of each part in a scored edit with PRUNE, from one batch; ``other`` is what is left."""
    restraint = PRUNE()
    restraint.attach(module)
    parts: dict[str, list[tuple[Any, str]]] = {
        "values": [(module, "optimise")],
        "keys": [(LayerwiseKeyReader, "keys"), (module, "walk")],
        "solve": [(module, "_rank_one" if isinstance(module, ROME) else "solve")],
    }
    if not isinstance(module, LocateThenEdit):
        parts = {"values": [(ultraedit, "edit_gradients")], "solve": [(module, "_solve")]}
    parts |= {
        "restraint": [(restraint, "after_step")],
        "settle": [(module.run, "settle")],
        "evaluation": [(scores, "success")],
    }

    def step() -> None:
        scores.success(module.language_model, batch)
        module.edit(batch)
        restraint.after_step(module.run.num_steps)
        module.run.settle()
        scores.success(module.language_model, batch)

    spent = Shares(device)
    for matrix in module.edited_matrices().values():
        restraint.reference(matrix)  # computed once
    with spent.measuring(parts):
        whole, _ = clock(step, device)
    module.run.restart()
    found = {part: seconds / whole for part, seconds in spent.seconds.items()}
    return found | {"other": 1 - sum(found.values()), "seconds": whole}


def with_options(module: EditingModule, **options: Any) -> None:
    """Change options of the value optimisation, where the method has one."""
    if isinstance(module, LocateThenEdit):
        module.value = replace(module.value, **options)


def traced(module: EditingModule, batch: list[EditRequest], file: Path, device: torch.device) -> list[dict[str, Any]]:
    """Write a trace of one batch and return the operations that take most of the time."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        module.compute_update(batch)
    found.export_chrome_trace(str(file))
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = sorted(found.key_averages(), key=lambda entry: -getattr(entry, key))[:25]
    return [{"name": e.key[:80], "count": e.count, "ms": getattr(e, key) / 1e3} for e in table]


def plain_edit(module: LocateThenEdit, requests: list[EditRequest]) -> tuple[Tensor, list[float]]:
    """Compute an edit as in the public code, without writing the weights; return values and first losses."""
    model = module.language_model
    site = site_of(module)
    values, _, losses, _ = zip(
        *(plain_value(model, rows, site, module.value) for rows in module.rows(requests)), strict=True
    )
    passes = [
        model.tokens.pad(
            [target_row(model, request, prefix).ids for request in requests for prefix in some], model.device
        )
        for some in (module.prefixes, module.prefixes[:1])
    ]
    with torch.no_grad():
        for inputs in passes * len(module.layers):
            model(*inputs)
    return torch.stack(values), [of_request[0] for of_request in losses]


def measure(
    module: EditingModule, requests: list[EditRequest], size: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return what a method needs in batches of one size."""
    timed = requests[: max(size, options.requests // size * size)]
    batches = [timed[start : start + size] for start in range(0, len(timed), size)]
    with_options(module, steps=3)
    clock(lambda: module.compute_update(batches[0]), device)  # load kernels, fill the allocator's cache
    with_options(module, steps=options.steps)
    with PeakMemory(device) as peak:
        if size > LARGE:  # long enough that the waits between parts do not count, and too long to run twice
            parts = shares(module, batches[0], device)
            seconds = [parts["seconds"]]
        else:
            seconds = [clock(lambda batch=batch: module.compute_update(batch), device)[0] for batch in batches]
            parts = shares(module, batches[0], device)
    return {
        "contexts": len(module.prefixes) if isinstance(module, LocateThenEdit) else 1,
        "layers": list(module.layers),
        "edits": len(timed),
        "seconds_per_edit": sum(seconds) / len(timed),
        "edits_per_second": len(timed) / sum(seconds),
        "seconds_by_batch": seconds,
        "peak_gib": peak.gib,
        "shares": parts,
    }


def against_plain(module: LocateThenEdit, timed: list[EditRequest], device: torch.device) -> dict[str, float]:
    """Return how long the plain path takes for some requests, and how its values differ.

    Adam's first step is the sign of the gradient, so that rounding in 16 bits turns components of the values. The
    losses before the first step have to agree to rounding.
    """
    site, full = site_of(module), module.value
    module.value = replace(full, steps=2)
    clock(lambda: plain_edit(module, timed[:1]), device)
    module.value = full
    module.language_model.fast_path.packed.clear()  # they are the fast path's
    with PeakMemory(device) as peak:
        plain, (values, losses) = clock(lambda: plain_edit(module, timed), device)
    ours = module.optimise(timed, site)
    first = [abs(d["losses"][0] - loss) / abs(loss) for d, loss in zip(ours.details, losses, strict=True)]
    return {
        "plain_seconds_per_edit": plain / len(timed),
        "plain_peak_gib": peak.gib,
        "difference": float((ours.target.double() - values.double()).norm() / values.double().norm()),
        "loss_difference": max(first),
    }


def main() -> None:
    """Run the cases and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2", help="of a model with random weights")
    parser.add_argument("--model", help="an option of configs/model, instead of --shape")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=["rome", "memit"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--steps", type=int, default=20, help="passes of the value optimisation")
    parser.add_argument("--requests", type=int, default=3, help="requests that are edited in small batches")
    parser.add_argument("--plain", type=int, default=1, help="requests on which the plain path is timed")
    parser.add_argument("--graph", action="store_true", help="also with value steps as CUDA graphs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--trace", type=Path, metavar="FILE", help=f"trace of one MEMIT batch, of {LARGE} at most")
    options = parser.parse_args()
    device = torch.device(options.device)
    model, name = load(options), options.model or options.shape
    stream = BundledWorld(num_edits=max(options.requests, *options.batch_sizes), protocol="sequential")
    stream.setup()
    requests = [request for batch in stream.batches() for request in batch.requests]
    found: dict[str, Any] = {name: str(value) for name, value in vars(options).items()} | {"records": []}
    for method in options.methods:
        module = build(method, model, name, options.steps)
        locating = isinstance(module, LocateThenEdit)
        plain: dict[str, float] = {}
        for size in options.batch_sizes if method != "rome" else [1]:
            graphs = locating and options.graph and device.type == "cuda" and size <= LARGE
            for graph in (False, True) if graphs else (False,):
                with_options(module, graph=graph)
                measured = measure(module, requests, size, options, device)
                if locating:
                    plain = plain or against_plain(module, requests[: options.plain], device)
                    measured |= plain | {"ratio": plain["plain_seconds_per_edit"] / measured["seconds_per_edit"]}
                found["records"].append({"method": method, "batch": size, "graph": graph} | measured)
                if options.json:  # after each, since the whole takes long
                    options.json.write_text(json.dumps(found, indent=2))
        module.run.restart()
        if options.trace and method == "memit":
            with_options(module, steps=min(4, options.steps), graph=False)
            size = max((size for size in options.batch_sizes if size <= LARGE), default=1)
            found["operations"] = traced(module, requests[:size], options.trace, device)
            found["traced"] = {"method": method, "batch": size}
        del module
        gc.collect()  # the moments of five layers of this size are of many GiB
    records = found["records"]
    keys = ("method", "batch", "graph", "contexts", "seconds_per_edit", "plain_seconds_per_edit", "ratio")
    keys += ("peak_gib", "plain_peak_gib", "difference", "loss_difference")
    table = Table(*(key.replace("_", " ") for key in keys), "values' share", title=f"{name}, {options.dtype}")
    for record in records:
        values = [record.get(key, "") for key in keys]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        table.add_row(*cells, f"{record['shares']['values']:.2f}")
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
