"""Time second moments of five layers with one full pass per layer and with one pass for all of them.

    python benchmarks/statistics.py                       GPT-2's 124M shape on the CPU
    python benchmarks/statistics.py --shape llama-3-8b --dtype bfloat16 --device cuda --tokens 65536
    python benchmarks/statistics.py --json FILE

The plain path runs the whole model, including logits, once per layer over batches of similar length, and sums the
products in the model's precision, as public code does. The moments of both are compared.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from shapes import SHAPES, random_model
from timing import clock
from torch import Tensor

from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments

LAYERS = {"gpt2": [3, 4, 5, 6, 7], "llama-3-8b": [4, 5, 6, 7, 8]}
WORDS = ("river", "town", "slowly", "music", "seven", "garden", "because", "engine", "letters", "north")


class Ragged:
    """Texts of 20 to 400 words: a corpus.

    Args:
        words: Total number of words.
    """

    def __init__(self, words: int) -> None:
        rng = random.Random(0)
        self.all: list[str] = []
        while words > 0:
            length = min(rng.randint(20, 400), words)
            self.all.append(" ".join(rng.choices(WORDS, k=length)))
            words -= length

    def __len__(self) -> int:
        return len(self.all)

    def identity(self) -> str:
        """Return a name."""
        return f"ragged {len(self)}"

    def texts(self) -> Iterator[str]:
        """Yield the texts."""
        yield from self.all


@torch.no_grad()
def one_layer_at_a_time(
    model: LanguageModel, layers: list[int], corpus: Ragged, moments: SecondMoments
) -> list[Tensor]:
    """Return the moments by one full pass per layer."""
    results = []
    pieces = [model.tokens.encode(text)[: moments.max_length] for text in corpus.texts()]
    batches = list(moments.batches(pieces))
    for layer in layers:
        module = model.rewrite_module(layer)
        total, count = torch.zeros(model.key_size(layer), model.key_size(layer), device=model.device), 0
        for batch in batches:
            ids, mask = model.tokens.pad(batch, model.device)
            with capture(inputs=[module], stop=False) as seen:
                model(ids, mask)
            keys = seen.inputs[0][mask.bool()].float()
            total.addmm_(keys.T, keys)
            count += len(keys)
        results.append(total.double() / count)
    return results


def main() -> None:
    """Run both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="approximate number of tokens")
    parser.add_argument("--token-budget", type=int, default=2048, help="padded tokens per forward pass, both paths")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = random_model(options.shape, getattr(torch, options.dtype), device)
    layers = LAYERS[options.shape]
    moments = SecondMoments(Ragged(options.tokens // 2), max_length=1024, token_budget=options.token_budget)
    warm_up = SecondMoments(Ragged(500), max_length=1024)
    warm_up.take(model, layers[:1])
    ours, found = clock(lambda: moments.take(model, layers), device)
    corpus = moments.corpus
    assert isinstance(corpus, Ragged)
    plain, expected = clock(lambda: one_layer_at_a_time(model, layers, corpus, moments), device)
    pairs = zip((found[layer] for layer in layers), expected, strict=True)
    result = {
        "shape": options.shape,
        "dtype": options.dtype,
        "device": options.device,
        "layers": layers,
        "tokens": moments.num_tokens,
        "tokens_per_second": moments.num_tokens / ours,
        "plain_tokens_per_second": moments.num_tokens / plain,
        "ratio": plain / ours,
        "difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }
    Console().print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
