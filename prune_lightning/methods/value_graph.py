"""A step of the value optimisation as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CapturedStep:
    """A function of one tensor, recorded as a CUDA graph: a step of thousands of short kernels becomes one launch.

    Shapes, and all tensors that the function reads but its argument, are those of the recording. It must have run once
    before, so that libraries are initialised, and may not wait for the device.

    Args:
        step: The function.
        example: An argument of it.
    """

    def __init__(self, step: Callable[[Tensor], Sequence[Tensor]], example: Tensor) -> None:
        self._argument = example.detach().clone()
        self._graph = torch.cuda.CUDAGraph()
        # Another thread, such as the ledger's, may copy from the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = step(self._argument)

    def __call__(self, argument: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results."""
        self._argument.copy_(argument)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)
