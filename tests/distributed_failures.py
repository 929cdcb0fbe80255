"""Run under ``torchrun`` by test_distributed.py: one rank fails, in every way in which it may do so alone."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.distributed import (
    all_reduce,
    broadcast,
    fail_together,
    gather,
    map_over_ranks,
    on_rank_zero,
    raised_on_all_ranks,
    true_on_all_ranks,
)
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.running_moments import RunningMoments
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.models.statistics_store import StatisticsStore
from prune_lightning.types import DenseUpdate

FAILING = 1


class Awkward(Exception):
    """An error that cannot be made from a message."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{why} ({code})")


class Editor(EditingModule):
    """Writes the same small update everywhere, but for what one rank does in its second step."""

    def __init__(self, fault: str, **kwargs) -> None:
        super().__init__(load_language_model("pkg://prune_lightning.bundled/model"), [0], **kwargs)
        self.fault = fault

    def compute_update(self, requests):
        faulty = self.run.num_steps == 1 and dist.get_rank() == FAILING
        if faulty and self.fault == "error":
            raise UserError("this rank alone has no memory left")
        updates = {}
        for name, matrix in self.edited_matrices().items():
            change = torch.full_like(matrix.weight(), 1e-3)
            if faulty and self.fault == "nan":
                change[0, 0] = float("nan")
            updates[name] = DenseUpdate(change)
        return updates, [{} for _ in requests]


def outcome(work):
    """Return what a call gives or raises, and whether the others know of the error."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}", raised_on_all_ranks(error), "".join(getattr(error, "__notes__", []))


def fail(error):
    raise error


def on_failing(error):
    if dist.get_rank() == FAILING:
        raise error
    return []


def fit(fault, non_finite):
    module = Editor(fault, non_finite=non_finite)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=BundledWorld(num_edits=3))
    (matrix,) = module.edited_matrices().values()
    return module.num_requests, float(matrix.delta().max()), module.run.last_report.applied


def nested():
    """The failing rank meets its error before an exchange that the other one is in already."""
    with fail_together():
        on_failing(ZeroDivisionError("before the exchange"))
        return map_over_ranks([1, 2, 3], lambda part: [2 * item for item in part])


class Broken:
    """A corpus that only one rank can read to its end."""

    def texts(self):
        yield from ["The first text."] * 3
        on_failing(OSError("the disk of this rank is gone"))
        yield "The last text."

    def __len__(self):
        return 4

    def identity(self):
        return "broken"


def statistics():
    model = load_language_model("pkg://prune_lightning.bundled/model")
    return len(SecondMoments(Broken()).compute(model, [0]))


def save(folder):
    """The first process cannot write."""
    blocked = folder / f"rank{dist.get_rank()}"
    blocked.write_text("a file where the folder should be")
    running = RunningMoments([4], torch.device("cpu"))
    StatisticsStore(blocked, {}).save_partial([0], running)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result, start = {}, time.perf_counter()
    result["gather"] = gather(rank * 10)
    result["broadcast"] = broadcast(f"from {rank}")
    result["all"] = [true_on_all_ranks(True), true_on_all_ranks(rank == 0)]
    result["map"] = map_over_ranks([1, 2, 3], lambda part: [(2 * item, dist.get_rank()) for item in part])
    result["zero"] = on_rank_zero(lambda: torch.full((2,), float(dist.get_rank())))
    result["large"] = on_rank_zero(lambda: torch.full((100_000,), 1.0 + dist.get_rank())).sum()
    total = torch.tensor([1.0 + rank])
    all_reduce([total])
    result["sum"] = total

    result["map fails"] = outcome(lambda: map_over_ranks([1, 2], lambda part: on_failing(UserError("no such fact"))))
    result["zero fails"] = outcome(lambda: on_rank_zero(lambda: fail(UserError("the disk is full"))))
    result["awkward"] = outcome(lambda: map_over_ranks([1, 2], lambda part: on_failing(Awkward(7, "odd"))))
    result["unpicklable"] = outcome(lambda: on_rank_zero(lambda: lambda: 0))[1:2]
    result["nested"] = outcome(nested)
    result["statistics"] = outcome(statistics)
    result["save"] = outcome(lambda: save(Path(sys.argv[1])))
    result["still in step"] = gather(rank)
    for fault, non_finite in (("nan", "skip"), ("nan", "raise"), ("error", "skip")):
        result[f"fit {fault} {non_finite}"] = outcome(lambda f=fault, n=non_finite: fit(f, n))
    result["seconds"] = time.perf_counter() - start

    gathered = gather(result)
    if rank == 0:
        torch.save(gathered, Path(sys.argv[1]) / "weights.pt")
    dist.barrier()
    os._exit(0)
