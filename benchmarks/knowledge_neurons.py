"""Time the attribution of knowledge neurons by the plain and the fast path, on a model with random weights.

    python benchmarks/knowledge_neurons.py                      GPT-2's 124M shape on the CPU
    python benchmarks/knowledge_neurons.py --shape small        a quarter of its width and a third of its depth
    python benchmarks/knowledge_neurons.py --device cuda --json FILE

The plain path is that of the public code: for every layer all points of the Riemann sum are one batch, which runs
through the whole model with the whole prompt and all logits. The attributions of both paths are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import random_model
from timing import clock
from torch import Tensor

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.methods.neuron_attribution import (
    NextToken,
    answer_tokens,
    integrated_gradients,
)
from prune_lightning.methods.patched_neurons import AttributionOptions
from prune_lightning.models.hooks import capture, edit_input
from prune_lightning.models.language_model import LanguageModel

SMALL = {"n_embd": 192, "n_layer": 4, "n_head": 4, "vocab_size": 12000}


def plain_attribution(model: LanguageModel, layer: int, question: NextToken, steps: int) -> Tensor:
    """Compute the attribution of one layer and one token as in the public code, at the down-projection's input."""
    site = model.rewrite_module(layer)
    ids, mask = model.tokens.pad([question.ids], model.device)
    with torch.no_grad(), capture(inputs=[site], stop=False) as seen:
        model(ids, mask)
    activation = seen.inputs[0][0, -1]
    patched = (torch.linspace(0, 1, steps, device=model.device)[:, None] * activation).requires_grad_()
    with edit_input(site, lambda value: torch.cat([value[:, :-1], patched[:, None]], dim=1)):
        logits = model(ids.expand(steps, -1), mask.expand(steps, -1))
    (gradient,) = torch.autograd.grad(logits[:, -1].softmax(-1)[:, question.token].sum(), [patched])
    return activation * gradient.mean(0)


def main() -> None:
    """Run both paths and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["gpt2", "small"], default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=3, help="facts that the fast path attributes, one by one")
    parser.add_argument("--plain-requests", type=int, default=1, help="facts on which the plain path is timed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = random_model("gpt2", torch.float32, device, **(SMALL if options.shape == "small" else {}))
    layers = range(model.num_layers)
    stream = BundledWorld(num_edits=options.requests, protocol="sequential")
    stream.setup()
    requests = [request for batch in stream.batches() for request in batch.requests]
    answers = [answer_tokens(model, [request.pair(request.target_old)])[0] for request in requests]

    def fast(answer: list[NextToken]) -> Tensor:
        found = integrated_gradients(model, layers, answer, AttributionOptions(steps=options.steps))
        return torch.stack([found[layer].mean(0) for layer in layers])

    def plain(answer: list[NextToken]) -> Tensor:
        return torch.stack(
            [torch.stack([plain_attribution(model, at, q, options.steps) for q in answer]).mean(0) for at in layers]
        )

    clock(lambda: fast(answers[0]), device)  # warm up
    ours = [clock(lambda a=answer: fast(a), device) for answer in answers]
    theirs = [clock(lambda a=answer: plain(a), device) for answer in answers[: options.plain_requests]]
    pairs = list(zip(ours, theirs, strict=False))
    tokens = [len(answer[0].ids) for answer in answers[: len(pairs)]]
    result: dict[str, Any] = {
        "prompt_tokens": sum(tokens) / len(tokens),
        "answer_tokens": sum(map(len, answers[: len(pairs)])) / len(pairs),
        "fast_seconds": sum(seconds for (seconds, _), _ in pairs) / len(pairs),
        "plain_seconds": sum(seconds for _, (seconds, _) in pairs) / len(pairs),
        "difference": max(float((a - b).norm() / b.norm()) for (_, a), (_, b) in pairs),
        "fast_seconds_all": [seconds for seconds, _ in ours],
    }
    result["ratio"] = result["plain_seconds"] / result["fast_seconds"]
    title = f"{options.shape}, {options.steps} points, {torch.get_num_threads()} threads"
    table = Table("", "value", title=title)
    for key, value in result.items():
        if not isinstance(value, list):
            table.add_row(key, f"{value:.3g}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, **result}, indent=2))


if __name__ == "__main__":
    main()
