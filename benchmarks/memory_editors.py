"""Time generation with and without a memory: what its lookup costs per prompt, and per token after it.

    python benchmarks/memory_editors.py        the bundled model, 10, 100 and 1,000 entries
    python benchmarks/memory_editors.py --model smollm2 --entries 10 200 --json FILE

Each entry is an edit of the bundled world that was trained for one step: how well it is written does not matter here.
Prompts are asked one by one, those of edits and unrelated ones, so that memories answer some and let others pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import clock

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.evaluation.decoding import decode
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.requests import EditRequest
from prune_lightning.tasks.recipe import Recipe, composed

METHODS = {
    "elder": {"steps": 1, "contexts": {"lengths": []}},
    "grace": {"steps": 1, "radius": 1e-3},
    "ike": {},
    "memoir": {"steps": 1, "contexts": {"lengths": []}},
    "serac": {},
    "wise": {"steps": 1, "contexts": {"lengths": []}},
}


def best(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median of the seconds that ``work`` takes."""
    return median(clock(work, device)[0] for _ in range(repeats))


def measured(model: LanguageModel, prompts: list[list[int]], new: int, repeats: int) -> dict[str, float]:
    """Return milliseconds per prompt with its first token, and per further token."""

    def asking(count: int) -> Callable[[], Any]:
        return lambda: [decode(model, [ids], [count]) for ids in prompts]

    asking(2)()
    first, all_of_them = (best(asking(count), model.device, repeats) for count in (1, new))
    tokens = sum(len(decode(model, [ids], [new])[0].ids) for ids in prompts) - len(prompts)
    return {
        "ms_per_prompt": 1e3 * first / len(prompts),
        "ms_per_token": 1e3 * (all_of_them - first) / max(1, tokens),
        "tokens": float(tokens),
    }


def main() -> None:
    """Fill the memories, time generation, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--entries", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--prompts", type=int, default=10, help="of edits, and as many unrelated ones")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    stream = BundledWorld(num_edits=max(options.entries), protocol="sequential")
    stream.setup()
    rows = [row for name in options.methods for row in times(name, stream.requests, options)]
    table = Table("method", "entries", "ms per prompt", "without", "ms per token", "without", title=options.model)
    for row in rows:
        pairs = [row[part][key] for key in ("ms_per_prompt", "ms_per_token") for part in ("with", "without")]
        table.add_row(row["method"], str(row["entries"]), *(f"{value:.2f}" for value in pairs))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, "rows": rows}, indent=2))


def times(name: str, requests: list[EditRequest], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the times of one method at each number of entries."""
    with composed({"model": options.model, "method": name}, {"method": METHODS[name]}) as config:
        recipe = Recipe.of(config)
    model = recipe.language_model()
    module = recipe.build(model)
    module.prepare()
    asked = [request.prompt for request in requests[: options.prompts]]
    prompts = model.tokens.encode_all([*asked, *general_sentences()[: options.prompts]])
    rows, written = [], 0
    for count in sorted(options.entries):
        for begin in range(written, count, 50):
            module.edit(requests[begin : min(begin + 50, count)])
            module.run.settle()
        written = count
        found = measured(model, prompts, options.new_tokens, options.repeats)
        with module.unedited():
            without = measured(model, prompts, options.new_tokens, options.repeats)
        rows.append({"method": name, "entries": count, "with": found, "without": without})
    return rows


if __name__ == "__main__":
    main()
