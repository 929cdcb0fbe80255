"""Measure the cost of a ledger at the shapes of GPT-2 XL and Llama-3-8B.

`python benchmarks/ledger.py [--model gpt2-xl] [--edits 100] [--json FILE]` writes rank-one edits of every matrix that
MEMIT edits into a ledger on the disk, with as many directions withheld at the end as PRUNE would withhold, and prints
bytes and seconds: per step, per snapshot, and for 10,000 edits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from prune_lightning.ledger import Ledger, StepRecord
from prune_lightning.ledger.sketch import StateSketch
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.types import LowRankUpdate

MODELS = {"gpt2-xl": (5, 1600, 6400, torch.float32), "llama-3-8b": (5, 4096, 14336, torch.bfloat16)}
REQUEST = {"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon"}


def build(model: str) -> dict[str, EditedMatrix]:
    """Return random matrices of a model's shape with one dominant singular value, like trained ones."""
    count, rows, columns, dtype = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for layer in range(count):
        weight = 0.02 * torch.randn(rows, columns, generator=generator) + 12 / (rows * columns) ** 0.5
        name = f"layer.{layer}"
        matrices[name] = EditedMatrix(name, nn.Parameter(weight.to(dtype), requires_grad=False), transposed=False)
    return matrices


def state(matrices: dict[str, EditedMatrix], step: int) -> dict[str, Any]:
    """Return the content of a snapshot; methods that protect keys add an inverse per matrix."""
    kept = {name: matrix.state_dict() for name, matrix in matrices.items()}
    return {"matrices": kept, "memory": {}, "num_requests": step, "num_steps": step}


def run(model: str, edits: int, folder: Path) -> dict[str, float]:
    """Write a ledger and return its figures."""
    matrices = build(model)
    ledger, sketch = Ledger.create(folder / "ledger", {}), StateSketch(matrices)
    sketch.take()  # draws the signs
    generator = torch.Generator().manual_seed(1)
    seconds = {"append": 0.0, "sketch": 0.0}
    for step in range(1, edits + 1):
        for matrix in matrices.values():
            matrix.begin_step()
            left, right = (torch.randn(n, 1, generator=generator) for n in matrix.original().shape)
            matrix.add(LowRankUpdate(left / left.norm(), 20 * right / right.norm()))
            if step == edits:
                parts = (torch.randn(n, edits, generator=generator).double() for n in matrix.original().shape)
                matrix.withhold(LowRankUpdate(*parts))
        start = time.perf_counter()
        taken = sketch.take()
        middle = time.perf_counter()
        events = {name: matrix.journal for name, matrix in matrices.items()}
        ledger.append(StepRecord(step, step, [REQUEST], events=events, sketch=taken))
        seconds["sketch"] += middle - start
        seconds["append"] += time.perf_counter() - middle
    size = sum(path.stat().st_size for path in ledger.folder.iterdir())
    start = time.perf_counter()
    snapshot = ledger.snapshots.write(edits, state(matrices, edits))
    took = time.perf_counter() - start
    return {
        "step_mb": size / edits / 1e6,
        "steps_10000_gb": size / edits * 10_000 / 1e9,
        "append_s": seconds["append"] / edits,
        "sketch_s": seconds["sketch"] / edits,
        "snapshot_gb": snapshot / 1e9,
        "snapshot_s": took,
        "minutes_between_snapshots": took / 0.01 / 60,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), nargs="*", default=sorted(MODELS))
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for model in options.model:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results[model] = run(model, options.edits, Path(folder))
        Console(width=200).print(model, *(f"{name} {value:.4g}" for name, value in results[model].items()), sep="  ")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
