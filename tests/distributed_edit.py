"""Run under ``torchrun`` by test_distributed.py: edits of the bundled model by two processes.

Under DDP they divide the requests, under FSDP2 the model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from prune_lightning.bundled.corpus import BundledCorpus
from prune_lightning.callbacks import PRUNE, EditLedger
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.distributed import gather, rank
from prune_lightning.evaluation.decoding import PREFILLED, decode
from prune_lightning.ledger import Ledger
from prune_lightning.methods import base
from prune_lightning.methods.alphaedit import AlphaEdit
from prune_lightning.methods.knowledge_neurons import KnowledgeNeurons, SelectionOptions
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.rome import ROME
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoments

STRATEGIES = {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}


def edit(third: str, cache: Path, strategy: str | None = None) -> dict[str, Any]:
    """Write nine facts in three batches by three methods and return the weights.

    The first method takes the statistics, saving them on the way; the second finds them.

    Args:
        third: The third method.
        cache: A folder.
        strategy: The strategy for two processes; ``None`` for one.
    """
    corpus = BundledCorpus(300, {"facts": 0.5, "text": 0.5})
    base.COMPARE_EVERY = 3
    result = {}
    shared = {
        "layers": [0, 1],
        "second_moments": SecondMoments(corpus, ridge=1e-3, token_budget=512, cache=cache, save_every=100),
        "value": ValueOptions(steps=6),
        "contexts": ContextOptions(lengths=[[10, 2]]),
    }
    methods = {
        "memit": (MEMIT, {"ridge": 50.0, **shared}),
        "alphaedit": (AlphaEdit, shared),
        "kn": (KnowledgeNeurons, {"selection": SelectionOptions(threshold=0.5)}),
        "rome": (ROME, {**shared, "layers": [1], "value": ValueOptions(steps=4)}),
    }
    for name in ("memit", "alphaedit", third):
        build, options = methods[name]
        ends, folder = ((6, 9) if strategy == "fsdp2" and name == "memit" else (9,)), cache / name
        for count in ends:  # resumed after six
            L.seed_everything(0, verbose=False)
            module = build(language_model=load_language_model("pkg://prune_lightning.bundled/model"), **options)
            ledger = Ledger.open(folder) if count != ends[0] else None
            callbacks = [PRUNE(1.5), EditLedger(folder, ledger=ledger)]
            trainer(strategy, *callbacks).fit(module, datamodule=stream(count, ledger.sizes if ledger else ()))
        result |= {f"{name} {n}": matrix.weight().clone() for n, matrix in module.edited_matrices().items()}
    return result


LIMITS = (12, 12, 3)


def decoded(model: LanguageModel, prefilled: Callable[[], bool]) -> list[tuple[int, ...]]:
    """Return the continuations of three prompts.

    Args:
        model: The model.
        prefilled: Says whether a fast path fits it.
    """
    model.fast_path.holds(PREFILLED, prefilled)
    prompts = [model.tokens.encode(text) for text in ("Q: Where does Anna live? A:", "The river", "One")]
    return [found.ids for found in decode(model, prompts, LIMITS, stops=["."])]


def decoded_apart() -> list[list[tuple[int, ...]]]:
    """Return what each of two processes decodes of a divided model, though one would choose other tokens."""
    model = load_language_model("pkg://prune_lightning.bundled/model")
    model.shard("cpu")
    if rank():
        model.model.get_output_embeddings().register_forward_hook(lambda module, args, logits: -logits)
    return gather(decoded(model, lambda: rank() == 0))


def stream(count: int, done: Sequence[int] = ()) -> BundledWorld:
    return BundledWorld(num_edits=count, protocol="sequential_batched", batch_size=3, done=done)


def trainer(strategy: str | None, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=2 if strategy else 1,
        strategy=STRATEGIES[strategy](process_group_backend="gloo") if strategy else "auto",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


if __name__ == "__main__":
    target, strategy, third = Path(sys.argv[1]), *sys.argv[2:]
    weights = edit(third, target / "both", strategy)
    if strategy == "fsdp2":
        weights["decoded"] = decoded_apart()
    if torch.distributed.get_rank() == 0:
        torch.save(weights, target / "weights.pt")
    torch.distributed.barrier()
    os._exit(0)
