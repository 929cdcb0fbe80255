"""PRUNE in a litgpt-style script with Lightning Fabric and a custom loop, by two calls.

python examples/litgpt_style.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch

from prune_lightning.callbacks import PRUNE
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model

TEXT = (Path(__file__).parent / "lighthouse.txt").read_text().splitlines()


def batches(model: LanguageModel, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = [model.tokens.encode(text) for text in TEXT]
    while True:
        for chosen in torch.randperm(len(rows)).split(size):
            yield model.tokens.pad([rows[i] for i in chosen], model.device)


def main(steps: int = 20) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    language_model = load_language_model("pkg://prune_lightning.bundled/model")
    model = language_model.model.requires_grad_(True).train()
    data = batches(language_model, 5)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    restraint = PRUNE(base=10.0, parameters=["*.mlp.*.weight"])
    restraint.attach(model)  # after the weights are on their device
    for step in range(1, steps + 1):
        ids, mask = next(data)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        restraint.after_step(step, last=step == steps)
        fabric.print(f"step {step:2d}  loss {loss.item():.3f}  above {restraint.metrics['restraint/num_above']:.0f}")


if __name__ == "__main__":
    main()
