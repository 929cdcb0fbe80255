"""Speed and memory of the machine that a plan is for: this one, measured in about a second, or a card of a preset."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil  # type: ignore[import-untyped]
import torch

from prune_lightning.costs import Machine
from prune_lightning.errors import UserError
from prune_lightning.ranges import NonNegative, Positive
from prune_lightning.tasks.counting import Counter

# See the table in docs/export.md.
RANGE_OF_ERROR = (
    "On the CPU that was measured, runs needed the memory of their plans to within 20 %, and 1.05 to 1.35 times the "
    "time per edit (docs/export.md)."
)
_CUDA_CONTEXT = 0.6e9
_OF_A_RUN = 0.2e9  # Trainer, evaluation and plots, on a CPU
Product = tuple[int, int, int]
"""``(tokens, in, out)`` of a typical matrix product of a run."""


class PlannedMachine(Protocol):
    """A machine to plan for."""

    name: str
    range_of_error: str

    @property
    def accelerator(self) -> str | None:
        """The Trainer's accelerator; ``None`` for the configured one."""

    def speed(self, device: torch.device, dtype: torch.dtype, product: Product) -> Machine:
        """Return its speed."""

    def memory(self, device: torch.device) -> float:
        """Return the bytes of memory that a run can have."""

    def host_memory(self) -> float | None:
        """Return the bytes of the CPU's memory that a run can have; ``None`` if that is not known."""

    def free_disk(self, folder: Path) -> float | None:
        """Return the free bytes of the disk that holds a folder; ``None`` if that is not known."""

    def libraries(self, device: torch.device) -> float:
        """Return the bytes that the interpreter and its libraries take there."""


@dataclass(frozen=True)
class Card:
    """A machine that is not this one, by figures of its data sheet; the same plan gives the same answer every time.

    Args:
        name: Its name.
        accelerator: The Trainer's accelerator on it.
        tflops: 10^12 operations per second, by dtype.
        bandwidth_gb_s: 10^9 bytes of memory read or written per second.
        overhead_us: Microseconds per operation, regardless of its size.
        memory_gb: Memory of the device, in 10^9 bytes.
        libraries_gb: What of it the libraries take.
        range_of_error: How far such plans are from runs, in a sentence.
    """

    name: str
    accelerator: Literal["cpu", "gpu"]
    tflops: Mapping[str, Positive]
    bandwidth_gb_s: Positive
    overhead_us: NonNegative
    memory_gb: Positive
    libraries_gb: NonNegative
    range_of_error: str = f"The speed is that of a data sheet; no run there was measured. {RANGE_OF_ERROR}"

    def speed(self, device: torch.device, dtype: torch.dtype, product: Product) -> Machine:
        """Return the speed that the figures give.

        Raises:
            UserError: There is no figure for the dtype.
        """
        name = str(dtype).removeprefix("torch.")
        if missing := {name, "float64"} - set(self.tflops):
            raise UserError(f"machine.tflops of {self.name} has no figure for {min(missing)}; plan.tflops gives one")
        flops, flops64 = self.tflops[name] * 1e12, self.tflops["float64"] * 1e12
        return Machine(flops, flops64, self.bandwidth_gb_s * 1e9, self.overhead_us * 1e-6)

    def memory(self, device: torch.device) -> float:
        """Return the whole memory of the card."""
        return self.memory_gb * 1e9

    def host_memory(self) -> float | None:
        """Return nothing: a card is put into all kinds of machines."""
        return None

    def free_disk(self, folder: Path) -> float | None:
        """Return nothing, for the same reason: the disk of the machine that plans is another."""
        return None

    def libraries(self, device: torch.device) -> float:
        """Return the libraries' share."""
        return self.libraries_gb * 1e9


class Here:
    """This machine."""

    name = "this machine, measured"
    accelerator = None
    range_of_error = RANGE_OF_ERROR

    def speed(self, device: torch.device, dtype: torch.dtype, product: Product) -> Machine:
        """Measure the speed."""
        return measure(device, dtype, product)

    def memory(self, device: torch.device) -> float:
        """Return the free memory."""
        return free_memory(device)

    def host_memory(self) -> float | None:
        """Return the free memory of the CPU."""
        return free_memory(torch.device("cpu"))

    def free_disk(self, folder: Path) -> float | None:
        """Return the free bytes of the folder's disk."""
        return float(shutil.disk_usage(folder).free)

    def libraries(self, device: torch.device) -> float:
        """Return what this process holds and what a run adds, or CUDA's context."""
        return _CUDA_CONTEXT if device.type == "cuda" else resident() + _OF_A_RUN


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


def measure(device: torch.device, dtype: torch.dtype, shape: Product) -> Machine:
    """Measure matrix products, memory traffic and the overhead of a small operation.

    Args:
        device: The device.
        dtype: Dtype of the weights.
        shape: A typical product of the run.
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
