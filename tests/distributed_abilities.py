"""Run under ``torchrun`` by test_abilities.py: a metric's parts on two processes, and work left to the first one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from prune_lightning.distributed import on_rank_zero
from prune_lightning.metrics import SentencePerplexity

NLL = torch.tensor([3.0, 8.0, 1.0, float("nan"), 2.0])
COUNT = torch.tensor([2, 4, 1, 3, 5])


def fail() -> dict[str, float]:
    raise RuntimeError("no such task")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result = {}
    for name, end in (("odd", 5), ("finite", 3), ("one", 1)):  # of a single sentence the second process has none
        metric = SentencePerplexity(reference=2.0)
        metric.update(NLL[:end][rank::2], COUNT[:end][rank::2])
        result[name] = metric.compute()
    result["said"] = on_rank_zero(lambda: {"rank": dist.get_rank()})
    try:
        on_rank_zero(fail)
    except RuntimeError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    gathered = [None, None]
    dist.all_gather_object(gathered, result)
    if rank == 0:
        torch.save(gathered, Path(sys.argv[1]) / "weights.pt")
    dist.barrier()
    os._exit(0)
