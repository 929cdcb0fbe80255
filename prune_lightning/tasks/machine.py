"""Measures the speed and the free memory of this machine, in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]
import torch

from prune_lightning.costs import Machine
from prune_lightning.tasks.counting import Counter


def _best(work: Callable[[], object], device: torch.device, seconds: float = 0.25) -> float:
    """Return the shortest time of repeated runs of some work."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once()]
    while sum(times) < seconds:
        times.append(once())
    return min(times)


def measure(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> Machine:
    """Measure matrix products, memory traffic and the overhead of a small operation.

    Args:
        device: The device.
        dtype: Dtype of the weights.
        shape: ``(tokens, in, out)`` of a typical product of the run.
    """
    tokens, inner, outer = shape
    left, right = torch.randn(tokens, inner).to(device, dtype), torch.randn(inner, outer).to(device, dtype)
    flops = 2 * tokens * inner * outer / _best(lambda: left @ right, device)
    double = torch.randn(768, 768, dtype=torch.float64).to(device)
    flops64 = 2 * 768**3 / _best(lambda: double @ double, device)
    large = torch.zeros(8_000_000, device=device)
    bandwidth = 3 * large.nbytes / _best(lambda: large + large, device)
    small = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    small, token = small.to(device), torch.zeros(1, 8, device=device, requires_grad=True)

    def through() -> object:
        return torch.autograd.grad(small(token).sum(), [token])

    with Counter() as count:
        through()
    return Machine(flops, flops64, bandwidth, _best(through, device) / count.operations)


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device; on the CPU those available without swapping."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def resident() -> float:
    """Return the resident bytes of this process, i.e. of the interpreter and its libraries."""
    return float(psutil.Process().memory_info().rss)
