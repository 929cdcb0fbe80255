"""Run under ``torchrun`` by test_editing_metrics.py: the metrics, their cases shared out over the ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from prune_lightning.metrics import CounterFactScore, GenerationScore, TokenMatch

CASES = 7  # odd, so that a sampler that hands out equal shares repeats one
WORDS = [f"word{number % 9}" for number in range(16)]


def shares(ranks: int) -> list[list[int]]:
    """Share out the cases as ``DistributedSampler`` does: in turn, the first ones again at the end."""
    padded = [*range(CASES), *range(-CASES % ranks)]
    return [padded[rank::ranks] for rank in range(ranks)]


def compute(cases: list[int], sparse: bool, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Feed the metrics with made-up numbers of some cases and return all results.

    Args:
        cases: Cases of this rank.
        sparse: Give the generation metric the cases up to 0 only, so that another rank has none.
        device: Where the metrics are.
    """
    counterfact, tokens, generation = (
        metric.to(device) for metric in (CounterFactScore(), TokenMatch(["efficacy"], harmonic=True), GenerationScore())
    )
    for case in cases:
        values = torch.Generator().manual_seed(case)
        for kind, prompts in (("efficacy", 1), ("generalization", 2), ("locality", 1 + case % 3)):
            nll = torch.rand(2, prompts, generator=values) * 3
            nll[0, 0] = float("nan") if case == 5 else nll[0, 0]
            hit = torch.rand(prompts, generator=values) < 0.5
            whole = (nll[0], nll[1], hit, torch.full((prompts,), case))
            counterfact.update(kind, *(each.to(device) for each in whole))
        tokens.update("efficacy", *(torch.tensor([each], device=device) for each in (case % 3, 3, case)))
        if not sparse or case == 0:
            generation.update([" ".join(WORDS[case:])], case)
    return {**tokens.compute(), **generation.compute(), **counterfact.compute()}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    share = shares(torch.distributed.get_world_size())[rank]
    if rank == 1:
        share = [case for case in share if case != 0]  # one rank repeats nothing, and sees no case with texts
    result = {"all": compute(shares(2)[rank], sparse=False), "sparse": compute(share, sparse=True)}
    if rank == 0:
        torch.save(result, Path(sys.argv[1]) / "weights.pt")
    torch.distributed.barrier()
    os._exit(0)
