"""Run under ``torchrun`` by test_distributed.py: gradient descent with PRUNE, each rank on its share of every batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prune_lightning.callbacks import PRUNE, RECT

STEPS = 6
BASE = 20.0


class Regression(L.LightningModule):
    """Two matrices, a learning rate that leaves the reference behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)
        self.double()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.first.weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.first, self.second):
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, outputs = (side[self.global_rank :: self.trainer.world_size] for side in batch)
        return 32 * ((self.second(self.first(inputs)) - outputs) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.008)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(scale * torch.randn(8, size, generator=generator).double() for size, scale in ((6, 1), (4, 5)))
        for _ in range(STEPS)
    ]


def fit(strategy: str, accumulate: str, folder: Path, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train, saving a checkpoint half way, and return the whole weights."""
    strategies = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": ModelParallelStrategy(2, 1, process_group_backend="gloo"),  # data parallel, tensor parallel
        "auto": "auto",
    }
    restraint = RECT(0.4) if accumulate == "rect" else PRUNE(BASE, accumulate=accumulate)
    checkpoint = folder / f"{strategy}_{accumulate}.ckpt"

    class SaveHalfWay(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == STEPS // 2 and not resume:
                trainer.save_checkpoint(checkpoint)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategies[strategy],
        max_epochs=1,
        callbacks=[restraint, SaveHalfWay()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module, data = Regression(), batches()
    # Lightning counts on when it resumes, but restarts the loader
    data = data[STEPS // 2 :] + data[: STEPS // 2] if resume else data
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint if resume else None, weights_only=True if resume else None)
    assert trainer.global_step == STEPS
    named = {"first": module.first.weight, "second": module.second.weight}
    return {n: (w.full_tensor() if isinstance(w, DTensor) else w).detach().clone() for n, w in named.items()}


if __name__ == "__main__":
    target, strategy, accumulate = Path(sys.argv[1]), *sys.argv[2:]
    result = {"straight": fit(strategy, accumulate, target)}
    result["resumed"] = fit(strategy, accumulate, target, resume=True)
    if torch.distributed.get_rank() == 0:
        torch.save(result, target / "weights.pt")
    torch.distributed.barrier()
    os._exit(0)  # threads of gloo under FSDP2 at times outlive the interpreter and abort it
