"""Run under ``torchrun`` by test_distributed.py: edits of the bundled model, the requests shared out over the ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from prune_lightning.bundled.corpus import BundledCorpus
from prune_lightning.callbacks import PRUNE
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.methods import base
from prune_lightning.methods.alphaedit import AlphaEdit
from prune_lightning.methods.knowledge_neurons import KnowledgeNeurons, SelectionOptions
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoments


def edit(distributed: bool, cache: Path) -> dict[str, torch.Tensor]:
    """Write nine facts in three batches by three methods and return the weights.

    The first method takes the statistics, saving them on the way; the second finds them.
    """
    corpus = BundledCorpus(300, {"facts": 0.5, "text": 0.5})
    base.COMPARE_EVERY = 3
    result = {}
    shared = {
        "layers": [0, 1],
        "second_moments": SecondMoments(corpus, ridge=1e-3, token_budget=512, cache=cache, save_every=100),
        "value": ValueOptions(steps=8),
        "contexts": ContextOptions(lengths=[[10, 2]]),
    }
    for name, build, options in (
        ("memit", MEMIT, {"ridge": 50.0, **shared}),
        ("alphaedit", AlphaEdit, shared),
        ("kn", KnowledgeNeurons, {"selection": SelectionOptions(threshold=0.5)}),
    ):
        L.seed_everything(0, verbose=False)
        module = build(language_model=load_language_model("pkg://prune_lightning.bundled/model"), **options)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2 if distributed else 1,
            strategy=DDPStrategy(process_group_backend="gloo") if distributed else "auto",
            max_epochs=1,
            callbacks=[PRUNE(1.5)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=BundledWorld(num_edits=9, protocol="sequential_batched", batch_size=3))
        result |= {f"{name} {n}": matrix.weight().clone() for n, matrix in module.edited_matrices().items()}
    return result


if __name__ == "__main__":
    weights = edit(True, Path(sys.argv[1]) / "both")
    if torch.distributed.get_rank() == 0:
        torch.save(weights, Path(sys.argv[1]) / "weights.pt")
    torch.distributed.barrier()
    os._exit(0)
