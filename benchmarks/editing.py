"""Time edits with ROME and MEMIT by the plain and the fast path, on a model with random weights.

    python benchmarks/editing.py                          GPT-2's 124M shape on the CPU
    python benchmarks/editing.py --shape llama-3-8b --dtype bfloat16 --device cuda
    python benchmarks/editing.py --batch-sizes 1 --json FILE

The plain path is that of the papers' and the public code: each value is optimised alone, every step runs the whole
model and computes all logits (``tests/plain_values.py``), and keys and hidden states need two whole forward passes per
edited layer. There is no early stopping: 20 steps each. Both paths are timed on the same requests (for a batch, the
plain path only on the first ones, since it processes them one by one), and their values are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, random_model
from timing import clock
from torch import Tensor

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.prompts import key_row
from prune_lightning.methods.rome import ROME
from prune_lightning.methods.value import ValueOptions
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.types import EditRequest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from plain_values import plain_value

LAYERS = {"gpt2": {"rome": [5], "memit": [3, 4, 5, 6, 7]}, "llama-3-8b": {"rome": [5], "memit": [4, 5, 6, 7, 8]}}
SITES = {"rome": "mlp", "memit": "block"}
WORDS = ("The", "river", "runs", "slowly", "through", "an", "old", "town", "where", "nobody", "has", "lived", "for")


def prefixes(count: int) -> list[str]:
    """Return prefixes, one half with five words and one half with ten."""
    words = itertools.cycle(WORDS)
    return [" ".join(itertools.islice(words, 5 if i < count // 2 else 10)) + ". " for i in range(count)]


def build(method: str, model: LanguageModel, shape: str) -> LocateThenEdit:
    """Return a method with identity statistics, since their values do not change the time of an edit."""
    shared: dict[str, Any] = {
        "language_model": model,
        "layers": LAYERS[shape][method],
        "second_moments": SecondMoments(None),
        "value": ValueOptions(stop_loss=0.0, clamp=4.0 if method == "rome" else 0.75),
        "contexts": ContextOptions(fixed=prefixes(20 if method == "rome" else 5)),
    }
    module = ROME(**shared) if method == "rome" else MEMIT(**shared, ridge=15000)
    module.prepare()
    return module


def plain_edit(module: LocateThenEdit, requests: list[EditRequest]) -> Tensor:
    """Compute an edit as in the public code, without writing the weights; return the values."""
    model = module.language_model
    site = ShiftSite(module.layers[-1], SITES["memit" if isinstance(module, MEMIT) else "rome"])
    values = [plain_value(model, rows, site, module.value)[0] for rows in module.rows(requests)]
    rows = [key_row(model, request, prefix) for request in requests for prefix in module.prefixes]
    ids, mask = model.tokens.pad([row.ids for row in rows], model.device)
    with torch.no_grad():
        for _ in range(2 * len(module.layers)):
            model(ids, mask)
    return torch.stack(values)


def main() -> None:
    """Run the cases and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=["rome", "memit"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--requests", type=int, default=3, help="requests on which the plain path is timed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = random_model(options.shape, getattr(torch, options.dtype), device)
    stream = BundledWorld(num_edits=max(options.requests, *options.batch_sizes), protocol="sequential")
    stream.setup()
    requests = [request for batch in stream.batches() for request in batch.requests]
    records = []
    for method, size in itertools.product(options.methods, options.batch_sizes):
        module, site = build(method, model, options.shape), ShiftSite(LAYERS[options.shape][method][-1], SITES[method])
        timed = requests[: options.requests]
        batches = [requests[start : start + size] for start in range(0, len(timed), size)]
        clock(lambda m=module, b=batches: m.compute_update(b[0][:1]), device)  # warm up
        whole, _ = clock(lambda m=module, b=batches: [m.compute_update(batch) for batch in b], device)
        in_values, values = clock(lambda m=module, b=batches, s=site: [m.optimise(batch, s) for batch in b], device)
        plain, theirs = clock(lambda m=module, b=timed: plain_edit(m, b), device)
        edits = sum(len(batch) for batch in batches)
        ours = torch.cat([part.target for part in values])[: len(timed)]
        records.append(
            {
                "method": method,
                "batch": size,
                "contexts": len(module.prefixes),
                "layers": list(module.layers),
                "seconds_per_edit": whole / edits,
                "edits_per_second": edits / whole,
                "plain_seconds_per_edit": plain / len(timed),
                "ratio": plain / len(timed) / (whole / edits),
                "share_of_values": min(1.0, in_values / whole),
                "difference": float((ours - theirs).norm() / theirs.norm()),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            }
        )
    keys = ("method", "batch", "contexts", "seconds_per_edit", "plain_seconds_per_edit", "ratio", "share_of_values")
    table = Table(*(key.replace("_", " ") for key in (*keys, "difference")), title=f"{options.shape}, {options.dtype}")
    for record in records:
        cells = [f"{record[key]:.3g}" if isinstance(record[key], float) else str(record[key]) for key in keys]
        table.add_row(*cells, f"{record['difference']:.1e}")
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, "records": records}, indent=2))


if __name__ == "__main__":
    main()
