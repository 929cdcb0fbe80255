"""Entries of a retention matrix; under ``torchrun`` they are shared out over two processes."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch

from prune_lightning.metrics import RetentionMatrix

CASES, CHECKPOINTS = 11, (3, 7, 9, 11)


def entries():
    """Every case before the first edit, just before and just after its own, and at each checkpoint after it."""
    draw = random.Random(1)
    result = [(0, i + 1, i, draw.random() / 10) for i in range(CASES)]
    result += [(i, i + 1, i, draw.random() / 5) for i in range(1, CASES)]
    result += [(i + 1, i + 1, i, 0.6 + draw.random() / 3) for i in range(CASES)]
    result += [(t, i + 1, i, draw.random()) for t in CHECKPOINTS for i in range(t - 1)]
    return [*result, (10, 2, 1, 0.9)]


ENTRIES = entries()


def filled(rows, device="cpu"):
    metric = RetentionMatrix().to(device)
    for t, *entry in rows:
        metric.update(t, *(torch.tensor([each], device=device) for each in entry))
    return metric


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    figures = {name: float(value) for name, value in filled(ENTRIES[rank::2]).compute().items()}
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(figures))
    torch.distributed.barrier()
    os._exit(0)
