"""An optimizer that does nothing, for a Trainer that counts the steps of optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class NoOpOptimizer(torch.optim.Optimizer):
    """Changes nothing, but lets Lightning count batches of edits as steps, e.g. for checkpoints.

    Args:
        parameter: Any parameter that requires a gradient.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__([parameter], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count."""
