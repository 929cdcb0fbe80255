"""Measure the cost of a ledger at the shapes of GPT-2 XL and Llama-3-8B.

`python benchmarks/ledger.py [--model gpt2-xl] [--edits 64] [--json FILE]` writes rank-one edits of every matrix that
MEMIT edits into a ledger on the disk: first without a restraint, then with as many directions withheld as there are
edits, and a snapshot with each step, as PRUNE needs. It prints bytes, the seconds that the loop of edits spends, and
those that pass in the background, per step and for 10,000 steps. The loop's seconds are those of the processor, so that
other work on the machine does not count; set OMP_NUM_THREADS=1.
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
from prune_lightning.ledger.snapshots import HeldState
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.types import LowRankUpdate

MODELS = {"gpt2-xl": (1600, 6400, torch.float32), "llama-3-8b": (4096, 14336, torch.bfloat16)}
REQUEST = {"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon"}


def build(model: str, count: int) -> dict[str, EditedMatrix]:
    """Return random matrices of a model's shape with one dominant singular value, like trained ones."""
    rows, columns, dtype = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for layer in range(count):
        weight = 0.02 * torch.randn(rows, columns, generator=generator) + 12 / (rows * columns) ** 0.5
        name = f"layer.{layer}"
        matrices[name] = EditedMatrix(name, nn.Parameter(weight.to(dtype), requires_grad=False), transposed=False)
    return matrices


def state(matrices: dict[str, EditedMatrix], step: int) -> dict[str, Any]:
    """Return the content of a snapshot. Methods that protect keys add an inverse per matrix."""
    kept = {name: matrix.state_dict() for name, matrix in matrices.items()}
    return {"matrices": kept, "memory": {}, "num_requests": step, "num_steps": step}


def write_steps(matrices: dict[str, EditedMatrix], edits: int, ledger: Ledger) -> dict[str, float]:
    """Write steps without a restraint; return seconds of the loop and in the background, per step."""
    sketch, generator = StateSketch(matrices), torch.Generator().manual_seed(1)
    sketch.take()  # draws the signs
    loop = background = 0.0
    for step in range(1, edits + 1):
        for matrix in matrices.values():
            matrix.begin_step()
            left, right = (torch.randn(n, 1, generator=generator) for n in matrix.original().shape)
            matrix.add(LowRankUpdate(left / left.norm(), 20 * right / right.norm()))
        start = time.thread_time()
        events = {name: matrix.journal for name, matrix in matrices.items()}
        ledger.append(StepRecord(step, step, [REQUEST], events=events, sketch=sketch.take()))
        loop += time.thread_time() - start
        start = time.perf_counter()
        ledger.wait()
        background += time.perf_counter() - start
    return {"loop_s": loop / edits, "background_s": background / edits}


def write_snapshot(matrices: dict[str, EditedMatrix], edits: int, ledger: Ledger) -> dict[str, float]:
    """Withhold as many directions as there are edits, and write a snapshot."""
    generator = torch.Generator().manual_seed(2)
    for matrix in matrices.values():
        parts = (torch.randn(n, edits, generator=generator).double() / n**0.5 for n in matrix.original().shape)
        matrix.withhold(LowRankUpdate(*parts))
        matrix.change.factored()  # as the restraint has needed it
    start = time.thread_time()
    held = HeldState.of(state(matrices, edits))
    copied = time.thread_time() - start
    size = ledger.snapshots.write(held)
    assert ledger.snapshots.seconds is not None
    return {"snapshot_gb": size / 1e9, "copy_s": copied, "write_s": ledger.snapshots.seconds}


def run(model: str, count: int, edits: int, folder: Path) -> dict[str, float]:
    """Write a ledger and return its figures."""
    matrices = build(model, count)
    ledger = Ledger.create(folder / "ledger", {})
    steps = write_steps(matrices, edits, ledger)
    size = sum(path.stat().st_size for path in ledger.folder.iterdir()) / edits
    return {
        "step_mb": size / 1e6,
        **steps,
        "gb_of_10000": size * 10_000 / 1e9,
        "loop_minutes_of_10000": steps["loop_s"] * 10_000 / 60,
        **write_snapshot(matrices, edits, ledger),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), nargs="*", default=sorted(MODELS))
    parser.add_argument("--matrices", type=int, default=5, help="every figure is proportional to it")
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for model in options.model:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results[model] = run(model, options.matrices, options.edits, Path(folder))
        Console(width=200).print(model, *(f"{name} {value:.4g}" for name, value in results[model].items()), sep="  ")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
