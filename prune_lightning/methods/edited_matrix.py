"""One weight matrix under edit: its original, the accumulated change in full precision, the weight as it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_lightning.types import WeightUpdate


class EditedMatrix:
    r"""Keeps :math:`W = W_0 + \Delta` with :math:`\Delta` in at least fp32, cast to the weight's dtype once per write.

    All matrices are handled as ``out_features x in_features``; a ``Conv1D`` weight is turned on reading and writing.

    Args:
        name: Qualified name of the weight.
        parameter: The live weight.
        transposed: The weight is stored ``in x out``.

    Attributes:
        delta: :math:`\Delta`, what the live weight carries; a restraint may have changed it.
        raw: The sum of the updates as the method computed them.
    """

    def __init__(self, name: str, parameter: nn.Parameter, transposed: bool) -> None:
        self.name, self.parameter, self.transposed = name, parameter, transposed
        self.original = parameter.detach().clone()
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.delta = torch.zeros_like(self._turned(self.original), dtype=dtype)
        self.raw = self.delta.clone()

    def _turned(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def reference(self) -> Tensor:
        """Return the original matrix, ``out_features x in_features``."""
        return self._turned(self.original).to(self.delta)

    def weight(self) -> Tensor:
        """Return the live weight, ``out_features x in_features``."""
        return self._turned(self.parameter.detach())

    def add(self, update: WeightUpdate) -> None:
        """Accumulate one update and write the weight."""
        dense = update.dense().to(self.delta)
        self.raw = self.raw + dense
        self.set_delta(self.delta + dense)

    @torch.no_grad()
    def set_delta(self, delta: Tensor) -> None:
        """Replace the accumulated change and write the weight."""
        self.delta = delta
        self.parameter.copy_(self._turned(self.reference() + delta))

    @torch.no_grad()
    def add_provisionally(self, update: WeightUpdate) -> None:
        """Change the live weight only; whoever does so puts it back (see ``EditingModule.provisional``)."""
        self.parameter.copy_(self._turned(self.reference() + self.delta + update.dense().to(self.delta)))

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the original weight, bit for bit."""
        self.delta, self.raw = torch.zeros_like(self.delta), torch.zeros_like(self.raw)
        self.parameter.copy_(self.original)
