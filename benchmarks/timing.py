"""Shared by the benchmarks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import psutil
import torch


class Shares:
    """Seconds spent in named parts of a computation; time in a nested part counts for that part alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._open = device, [0.0]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def measuring(self, parts: Mapping[str, Sequence[tuple[Any, str]]]) -> Iterator[None]:
        """Measure methods inside the block.

        Args:
            parts: By the part's name, pairs of an object or a class and the name of its method.
        """
        before = [(owner, name, vars(owner).get(name)) for pairs in parts.values() for owner, name in pairs]
        for part, pairs in parts.items():
            for owner, name in pairs:
                setattr(owner, name, self._measured(part, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, own in before:
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

    def _measured(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            self._open.append(0.0)
            try:
                return work(*args, **kwargs)
            finally:
                whole, nested = self._now() - start, self._open.pop()
                self._open[-1] += whole
                self.seconds[part] = self.seconds.get(part, 0.0) + whole - nested

        return timed


def clock(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that ``work`` takes, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class PeakMemory:
    """The largest memory of the process inside a ``with`` block, in GiB: on a GPU PyTorch's, else the resident set.

    The resident set is read every 5 ms. It includes the libraries and whatever was allocated before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.gib = device, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.gib = max(self.gib, process.memory_info().rss / 2**30)
            if self._done.wait(0.005):
                break

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated() / 2**30
        else:
            self._done.set()
            self._thread.join()
