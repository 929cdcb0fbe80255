"""Matrices of a module that is trained by an optimizer: their change is what the weights moved by."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prune_lightning.errors import UserError, near


class SnapshotMatrix:
    """A trained weight with a copy of its original.

    Args:
        name: Name of the parameter.
        parameter: The live weight, two-dimensional.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.original = parameter.detach().clone()
        self._dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._restrained = torch.zeros_like(self.original, dtype=self._dtype)
        self._sum = torch.zeros_like(self._restrained)

    def reference(self) -> Tensor:
        """Return the original matrix."""
        return self.original.to(self._dtype)

    @property
    def delta(self) -> Tensor:
        """The change that the live weight carries."""
        return self.parameter.detach().to(self._dtype) - self.reference()

    @property
    def raw(self) -> Tensor:
        """The sum of all changes by the optimizer, restraints left out."""
        return self._sum + (self.delta - self._restrained)

    @torch.no_grad()
    def set_delta(self, delta: Tensor) -> None:
        """Replace the change and write the weight."""
        self._sum = self.raw
        self.parameter.copy_(self.reference() + delta)
        self._restrained = self.delta

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a restart needs."""
        return {"original": self.original, "sum": self._sum, "restrained": self._restrained}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the original and the sums of an earlier run."""
        self.original = state["original"].to(self.parameter)
        self._sum = state["sum"].to(self.parameter.device)
        self._restrained = state["restrained"].to(self.parameter.device)


def matching_matrices(module: nn.Module, patterns: Sequence[str] | None) -> dict[str, SnapshotMatrix]:
    """Return the matrices of a module that a restraint is to watch, tied ones once.

    Args:
        module: Any module.
        patterns: ``fnmatch`` patterns of parameter names; ``None`` for all trained Linear and Conv1D weights.

    Raises:
        UserError: A pattern matches no two-dimensional parameter, or nothing is trained.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim == 2}
    if patterns is None:
        layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        names = [f"{name}.weight" for name, layer in layers.items() if layer.weight.requires_grad]
        chosen = [name for name in names if name in named]
    else:
        chosen = []
        for pattern in patterns:
            found = [name for name in named if fnmatchcase(name, pattern)]
            if not found:
                raise UserError(f"restraint.parameters: no matrix matches {pattern!r}: {near(pattern, named)}")
            chosen += found
    if not chosen:
        raise UserError("the restraint finds no trained Linear or Conv1D weight; name some with `parameters`")
    return {name: SnapshotMatrix(name, named[name]) for name in dict.fromkeys(chosen)}
