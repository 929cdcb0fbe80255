"""Dropout whose random numbers do not depend on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CPUDropout(nn.Dropout):
    """Dropout that draws on the CPU, so that a seed means the same on every device; on the CPU it is PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled input, with some entries zero."""
        if not self.training:
            return input
        kept = torch.empty(input.shape, dtype=torch.bool).bernoulli_(1 - self.p)
        return input * kept.to(input.device).to(input.dtype).div_(1 - self.p)


def draw_on_the_cpu(layers: nn.ModuleDict) -> None:
    """Replace PyTorch's dropout in a dictionary of modules."""
    for name, layer in layers.items():
        if type(layer) is nn.Dropout:
            layers[name] = CPUDropout(layer.p)
