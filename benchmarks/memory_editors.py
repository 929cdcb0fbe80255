"""Time generation with and without a memory, and scores in rows of their own and with shared beginnings.

    python benchmarks/memory_editors.py        the bundled model, 10, 100 and 1,000 entries
    python benchmarks/memory_editors.py --model smollm2 --entries 10 200 --json FILE

Each entry is an edit of the bundled world that was trained for one step: how well it is written does not matter here.
Prompts are asked one by one, those of edits and unrelated ones, so that memories answer some and let others pass. The
times per prompt and per further token are what the lookup costs.

Scores are those of unrelated questions with four answers each behind five examples, as in the abilities. Those that the
memory leaves alone share their beginnings; on the plain path every pair is a row of its own.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import clock

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.evaluation.scoring import score_encoded
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.models.generating import generation_settings
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.packing import parts
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


def asking(model: LanguageModel, prompts: Sequence[Sequence[int]], new: int) -> Callable[[], None]:
    """Return what generates ``new`` tokens behind each prompt, one prompt at a time, also behind an end token.

    Both with and without a memory it is the model's own ``generate``, so that the difference is what the memory costs.
    """

    def work() -> None:
        for prompt in prompts:
            ((ids, _),) = model.asked([(prompt, len(prompt))])
            row = torch.tensor([list(ids)[new - model.tokens.max_length :]], device=model.device)
            model.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, min_new_tokens=new)

    return work


def measured(module: EditingModule, prompts: Sequence[Sequence[Sequence[int]]], new: int) -> dict[str, Any]:
    """Return milliseconds per prompt with its first token, and per further token, with and without the memory.

    Args:
        module: The method, with its edits.
        prompts: Two lists for each repetition, all different: a memory may know what it was asked before.
        new: Tokens behind each prompt.
    """
    model, seconds = module.language_model, defaultdict[tuple[str, int], list[float]](list)
    with torch.no_grad(), generation_settings(model):
        for number, chosen in enumerate(prompts):
            count = new if number % 2 else 1
            for name, place in (("with", nullcontext()), ("without", module.unedited())):
                with place:
                    spent, _ = clock(asking(model, chosen, count), model.device)
                if number > 1:  # the first ones warm up
                    seconds[name, count].append(spent)
    middle = {key: 1e3 * median(found) / len(prompts[0]) for key, found in seconds.items()}
    return {
        name: {"ms_per_prompt": middle[name, 1], "ms_per_token": (middle[name, new] - middle[name, 1]) / (new - 1)}
        for name in ("with", "without")
    }


def scored(module: EditingModule, questions: int) -> dict[str, float]:
    """Return seconds for scores in rows of their own and with shared beginnings, and how far they differ."""
    model, sentences = module.language_model, general_sentences()[::-1]
    examples = "\n".join(sentences[:5])
    pairs = model.tokens.encode_pairs(
        [
            (f"{examples}\n{sentence.rpartition(' ')[0]}", sentences[i + answer].rpartition(" ")[2])
            for i, sentence in enumerate(sentences[5 : 5 + questions])
            for answer in range(4)
        ]
    )
    left, _ = next(parts(model, [pair.ids[: pair.target_start] for pair in pairs]))
    score_encoded(model, pairs[:8])  # warm up
    rows, plain = clock(lambda: score_encoded(model, pairs, trees=False), model.device)
    shared, found = clock(lambda: score_encoded(model, pairs), model.device)
    return {
        "seconds_rows": rows,
        "seconds_shared": shared,
        "ratio": rows / shared,
        "share_left_alone": len(left) / len(pairs),
        "difference_of_nll": float((plain.nll - found.nll).abs().max()),
    }


def main() -> None:
    """Fill the memories, time generation, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--networks", metavar="FOLDER", help="SERAC's trained networks; the bundled model has its own")
    parser.add_argument("--entries", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--prompts", type=int, default=10, help="of edits, and as many unrelated ones")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--questions", type=int, default=24, help="to score")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    stream = BundledWorld(num_edits=max(options.entries), protocol="sequential")
    stream.setup()
    rows = [row for name in options.methods for row in times(name, stream.requests, options)]
    table = Table("method", "entries", "ms per prompt", "without", "ms per token", "without", title=options.model)
    for row in rows:
        pairs = [row[part][key] for key in ("ms_per_prompt", "ms_per_token") for part in ("with", "without")]
        table.add_row(row["method"], str(row["entries"]), *(f"{value:.2f}" for value in pairs))
    scores = Table("method", "entries", "s in rows", "s shared", "ratio", "left alone", "difference", title="Scores")
    for row in rows:
        names = ("seconds_rows", "seconds_shared", "ratio", "share_left_alone", "difference_of_nll")
        values = [row["scores"][name] for name in names]
        scores.add_row(row["method"], str(row["entries"]), *(f"{value:.2g}" for value in values))
    console = Console()
    console.print(table)
    console.print(scores)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, "rows": rows}, indent=2))


def times(name: str, requests: list[EditRequest], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the times of one method at each number of entries."""
    settings = METHODS[name] | ({"path": options.networks} if name == "serac" and options.networks else {})
    with composed({"model": options.model, "method": name}, {"method": settings}) as config:
        recipe = Recipe.of(config)
    model = recipe.language_model()
    module = recipe.build(model)
    module.prepare()
    asked = [request.prompt for request in requests[: options.prompts]] + general_sentences()[: options.prompts]
    prompts = [model.tokens.encode_all([f"({i}) {text}" for text in asked]) for i in range(2 * options.repeats + 2)]
    rows, written = [], 0
    for count in sorted(options.entries):
        for begin in range(written, count, 50):
            module.edit(requests[begin : min(begin + 50, count)])
            module.run.settle()
        written = count
        rows.append({"method": name, "entries": count, **measured(module, prompts, options.new_tokens)})
        rows[-1]["scores"] = scored(module, options.questions)
    return rows


if __name__ == "__main__":
    main()
