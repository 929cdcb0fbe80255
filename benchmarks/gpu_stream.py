"""Edit at 7B shape for a given time, with PRUNE, and write whether an edit still takes as long at the end.

    python benchmarks/gpu_stream.py --seconds 60 --json FILE
    python benchmarks/gpu_stream.py --shape toy --device cpu --dtype float32 --batch 8 --edits 64

The model has random weights; requests are those of the bundled world, again and again. The method is UltraEdit, which
optimises no values, where it is known, or the one that ``--method`` names.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from editing import build, known
from rich.console import Console
from shapes import SHAPES, random_model
from timing import clock

from prune_lightning.callbacks import PRUNE
from prune_lightning.data.bundled import BundledWorld


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Edit until the time or the edits are used up; yield the figures so far after each batch."""
    device = torch.device(options.device)
    model = random_model(options.shape, getattr(torch, options.dtype), device)
    module = build(options.method, model, options.shape, options.steps, options.graph)
    stream = BundledWorld(num_edits=200)
    stream.setup()
    requests = cycle(request for batch in stream.batches() for request in batch.requests)
    restraint, batches = PRUNE(), []
    restraint.attach(module)
    ends = time.perf_counter() + options.seconds
    while module.num_requests < options.edits and time.perf_counter() < ends:
        batch = list(islice(requests, min(options.batch, options.edits - module.num_requests)))

        def step(batch: list = batch) -> None:
            module.edit(batch)
            restraint.after_step(module.run.num_steps)
            module.run.settle()

        seconds, _ = clock(step, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        batches.append({"edits": len(batch), "seconds": seconds, "peak_gib": peak})
        yield {"arguments": {name: str(value) for name, value in vars(options).items()}, **figures(batches)}


def figures(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how fast some batches were, and whether the last ones took as long as the first."""
    timed = batches[1:] or batches  # the first one loads kernels and computes the references
    per_edit = [entry["seconds"] / entry["edits"] for entry in timed]
    tenths = [float(np.mean(part)) for part in np.array_split(per_edit, min(10, len(per_edit)))]
    return {
        "edits": sum(entry["edits"] for entry in batches),
        "seconds": sum(entry["seconds"] for entry in batches),
        "edits_per_second": 1 / float(np.mean(per_edit)),
        "seconds_per_edit_by_tenth": tenths,
        "last_over_first": tenths[-1] / tenths[0],
        "batches": batches,
    }


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", default=next(name for name in ("ultraedit", "memit") if known(name)))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--graph", action="store_true", help="value steps as CUDA graphs")
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    for found in run(options):
        if options.json:  # after each batch, since a limit of time may end the program
            options.json.write_text(json.dumps(found, indent=2))
    text = f"{found['edits']} edits in {found['seconds']:.1f} s, {found['edits_per_second']:.1f} a second; "
    Console(width=140).print(f"{text}the last tenth took {found['last_over_first']:.2f} times as long as the first")


if __name__ == "__main__":
    main()
