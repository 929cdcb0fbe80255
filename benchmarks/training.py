"""Time edits that train by gradient descent, by the plain and the fast path: fine-tuning and editors with a memory.

    python benchmarks/training.py --model smollm2
    python benchmarks/training.py --model smollm2 --methods grace --requests 20 --batch-size 10 --json FILE

The plain path runs the whole model in every step, the fast one only what the trained weights reach. Both make the same
edits, with the method's own number of steps and no early stop; what they write is compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import clock
from torch import Tensor

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.requests import EditRequest
from prune_lightning.tasks.recipe import Recipe, composed
from prune_lightning.types import MemoryUpdate, Update

METHODS = {
    "ft": {"stop_loss": 0.0, "skip_loss": 0.0},
    "grace": {},
    "memoir": {"stop_loss": 0.0},
    "wise": {"stop_loss": 0.0},
    "elder": {},
}


def values(updates: Mapping[str, Update]) -> Tensor:
    """Return all that updates write, as one vector."""
    found: list[Tensor] = []
    for update in updates.values():
        if isinstance(update, MemoryUpdate):
            found += [tensor.double().flatten() for tensor in update.tensors.values() if tensor.is_floating_point()]
        else:
            found.append(update.dense().double().flatten())
    return torch.cat(found)


def written(
    name: str, model: LanguageModel, requests: list[EditRequest], fast: bool, options: argparse.Namespace
) -> tuple[float, Tensor, list[float]]:
    """Return the seconds per edit, what the first batch writes, and the losses of its first request."""
    with composed({"model": options.model, "method": name}, {"method": METHODS[name]}) as config:
        module: Any = Recipe.of(config).build(model)
    module.fast = fast
    module.prepare()
    steps, module.steps = module.steps, 2
    module.compute_update(requests[:1])  # warm up
    module.steps = steps
    batches = [requests[i : i + options.batch_size] for i in range(0, len(requests), options.batch_size)]
    found = [clock(partial(module.compute_update, batch), model.device) for batch in batches]
    updates, details = found[0][1]
    return sum(seconds for seconds, _ in found) / len(requests), values(updates), details[0]["losses"]


def measured(name: str, model: LanguageModel, requests: list[EditRequest], options: argparse.Namespace) -> Any:
    """Return a row of the table."""
    fast, ours, losses = written(name, model, requests, True, options)
    plain, theirs, expected = written(name, model, requests, False, options)
    return {
        "method": name,
        "steps": len(expected),
        "seconds": fast,
        "plain_seconds": plain,
        "ratio": plain / fast,
        "difference": float((ours - theirs).norm() / theirs.norm()),
        "first_losses": [losses[0], expected[0]],
        "last_losses": [losses[-1], expected[-1]],
    }


def main() -> None:
    """Time each method and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    stream = BundledWorld(num_edits=options.requests, protocol="sequential")
    stream.setup()
    with composed({"model": options.model}, {}) as config:
        model = Recipe.of(config).language_model()
    rows, table = [], Table("method", "steps", "s per edit", "plain", "ratio", "difference", "last loss")
    for name in options.methods:
        rows.append(row := measured(name, model, stream.requests, options))
        if options.json:  # at once: a method takes minutes on a large model
            options.json.write_text(json.dumps({**vars(options), "json": None, "rows": rows}, indent=2))
        table.add_row(
            row["method"],
            str(row["steps"]),
            *(f"{row[key]:.3g}" for key in ("seconds", "plain_seconds")),
            f"{row['ratio']:.1f}",
            f"{row['difference']:.0e}",
            f"{row['last_losses'][0]:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
