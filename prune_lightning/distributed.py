"""Share independent work out over the processes of a distributed run, and give everybody all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes, one outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, zero outside of a distributed run."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def true_on_all_ranks(answer: bool) -> bool:
    """Whether the answer is yes on every process."""
    if world_size() == 1:
        return answer
    answers: list[bool] = [False] * world_size()
    dist.all_gather_object(answers, answer)
    return all(answers)


def broadcast(value: Item) -> Item:
    """Return the first process's value."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def map_over_ranks(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
    """Return ``work(items)``, each process doing every n-th item.

    Args:
        items: The same on every process.
        work: Takes some of the items and returns one result for each, on the CPU, in their order; it does not
            communicate.
    """
    size = world_size()
    if size == 1:
        return work(items)
    mine = items[rank() :: size]
    gathered: list[list[Result]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, work(mine) if mine else [])
    return [gathered[i % size][i // size] for i in range(len(items))]
