"""Share independent work out over the processes of a distributed run, and give everybody all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes, one outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(value: Item) -> Item:
    """Return the first process's value."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shared_out(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
    """Return ``work(items)``, each process doing every n-th item.

    Args:
        items: The same on every process.
        work: Takes some of the items and returns one result for each, on the CPU, in their order; it does not
            communicate.
    """
    size = world_size()
    if size == 1:
        return work(items)
    rank = dist.get_rank()
    mine = items[rank::size]
    gathered: list[list[Result]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, work(mine) if mine else [])
    return [gathered[i % size][i // size] for i in range(len(items))]
