"""Exchange values between the processes of a distributed run; an error on one rank is raised on all of them.

In every exchange each rank sends a value, or the error that it met instead. If any rank sends an error, every rank
raises it: the same type with the same message, which names the rank unless all ranks met the same error. So no rank
waits for one that has failed.

An exchange must be reached by all ranks. Work between two exchanges that may fail on one rank alone belongs into
:func:`map_over_ranks`, :func:`on_rank_zero` or :func:`fail_together`. The error then takes the place of the failing
rank's next exchange, wherever the other ranks stand. Outside of a distributed run nothing is exchanged and errors pass
unchanged.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

_SMALL = 2**16  # bytes
_SHARED = "_raised_on_all_ranks"


@dataclass(frozen=True)
class _Failure:
    """What a rank sends in place of a value: the error to raise, and the traceback of the original."""

    error: Exception
    trace: str


def world_size() -> int:
    """Return the number of processes, one outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, zero outside of a distributed run."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(value: Item) -> list[Item]:
    """Return the value of every process, in the order of their ranks.

    Args:
        value: Can be pickled; tensors are on the CPU.
    """
    return _exchange(lambda: value)


def broadcast(value: Item) -> Item:
    """Return the first process's value.

    Args:
        value: Can be pickled; tensors are on the CPU. What other processes give is ignored.
    """
    return on_rank_zero(lambda: value)


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes.

    Args:
        tensors: On the device that the processes communicate by; as many on every process, of the same shapes.
    """
    gather(None)
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def take_first(tensor: Tensor) -> None:
    """Replace a tensor by the first process's, in place.

    Args:
        tensor: On the device that the processes communicate by; of the same shape on every process.
    """
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def true_on_all_ranks(answer: bool) -> bool:
    """Whether the answer is yes on every process."""
    return all(gather(answer))


def map_over_ranks(
    items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]], everywhere: bool = False
) -> list[Result]:
    """Return ``work(items)``, each process doing every n-th item.

    Args:
        items: The same on every process.
        work: Takes some of the items and returns one result for each, on the CPU, in their order; it does not
            communicate.
        everywhere: See :func:`on_rank_zero`: every process does all items.

    Raises:
        Exception: What ``work`` raised on the first of the ranks where it failed, on every rank.
    """
    size = world_size()
    if everywhere or size == 1:
        return on_rank_zero(lambda: work(items), everywhere)
    mine = items[rank() :: size]
    gathered = _exchange(lambda: work(mine) if mine else [])
    return [gathered[i % size][i // size] for i in range(len(items))]


def on_rank_zero(work: Callable[[], Result], everywhere: bool = False) -> Result:
    """Run ``work`` on the first process alone and return its result on all of them.

    Args:
        work: Returns what can be pickled, tensors on the CPU; it does not communicate.
        everywhere: Run it on all processes, and return the first one's result. A sharded model needs this: its parts
            are exchanged in every pass.

    Raises:
        Exception: What ``work`` raised, on every rank.
    """
    if world_size() == 1:
        return work()
    box: list[Any] = [None]

    def first() -> bytes | None:
        if rank() and not everywhere:
            return None
        box[0] = pickle.dumps(work())
        return box[0] if len(box[0]) <= _SMALL else None

    # A gather sends as much from every rank as from the first: large results take a second way.
    if (small := _exchange(first)[0]) is not None:
        return pickle.loads(small)
    dist.broadcast_object_list(box, src=0)
    return pickle.loads(box[0])


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise an error of the block on every rank.

    All ranks enter the block and exchange at its end whether it failed. Exchanges inside the block are fine.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error

    def outcome() -> None:
        if failure is not None:
            raise failure

    _exchange(outcome)


def raised_on_all_ranks(error: BaseException) -> bool:
    """Whether an error has been exchanged, so that every rank raises the same one."""
    return getattr(error, _SHARED, False)


def _exchange(work: Callable[[], Result]) -> list[Result]:
    """Run ``work`` on every process and return all results; raise the error of the first rank that met one."""
    if world_size() == 1:
        return [work()]
    original: Exception | None = None
    try:
        mine = pickle.dumps(work())
    except Exception as error:
        if raised_on_all_ranks(error):  # the other ranks raise it too; they will not wait for this one
            raise
        original, mine = error, pickle.dumps(_Failure(_portable(error), "".join(traceback.format_exception(error))))
    received: list[bytes] = [b""] * world_size()
    dist.all_gather_object(received, mine)
    outcomes: list[Any] = [pickle.loads(each) for each in received]
    failures = {number: outcome for number, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)}
    if failures:
        _raise(failures, original)
    return outcomes


def _raise(failures: Mapping[int, _Failure], original: Exception | None) -> NoReturn:
    """Raise the error of the first rank, named after it unless all ranks met the same."""
    first, failure = next(iter(failures.items()))
    kinds = {(type(each.error), str(each.error)) for each in failures.values()}
    same = original is not None and len(failures) == world_size() and len(kinds) == 1
    error = original if same and original else _portable(failure.error, f"rank {first}: ")
    setattr(error, _SHARED, True)
    if error is original:
        raise error
    if first != rank():
        error.add_note(failure.trace)
    raise error from original


def _portable(error: Exception, prefix: str = "") -> Exception:
    """Return an error that can be sent: of the same type where that can be made from a message."""
    try:
        made = type(error)(f"{prefix}{error}")
        pickle.loads(pickle.dumps(made))
    except Exception:
        return RuntimeError(f"{prefix}{type(error).__name__}: {error}")
    return made
