"""The spectral engine in a plain PyTorch loop: copy the matrices, and call ``restrain_`` after each step.

python examples/plain_pytorch.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from prune_lightning.models.loading import load_language_model
from prune_lightning.spectral import Logarithm, restrain_, sigma_max

TEXT = (Path(__file__).parent / "lighthouse.txt").read_text().splitlines()


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    model = load_language_model("pkg://prune_lightning.bundled/model")
    ids, mask = model.tokens.pad([model.tokens.encode(text) for text in TEXT], model.device)
    weights = [model.rewrite_module(layer).weight.requires_grad_(True) for layer in range(model.num_layers)]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)

    law = Logarithm(base=10.0)
    originals = [weight.detach().clone() for weight in weights]
    references = [sigma_max(original) for original in originals]

    for step in range(steps):
        loss = model.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        above = 0
        for weight, original, reference in zip(weights, originals, references, strict=True):
            above += restrain_(weight, original, law, reference).num_above
        print(f"step {step:2d}  loss {loss.item():.3f}  restrained {above} singular values")


if __name__ == "__main__":
    main()
