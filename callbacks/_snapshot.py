"""Matrices of a module that is trained by an optimizer. Their change is the weight minus a copy of the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from prune_lightning.errors import UserError, near
from prune_lightning.types import LowRankUpdate


class SnapshotMatrix:
    r"""A trained weight with a copy of its original: :math:`\Delta = W - W_0 +` what is withheld.

    A sharded weight (``DTensor``) and its copies stay sharded. The whole matrix is gathered only while it is read, and
    every rank computes the same result from it.

    Args:
        name: Name of the parameter.
        parameter: The live weight, two-dimensional.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self._original = parameter.detach().clone()
        self._withheld: Tensor | None = None
        self._previous: Tensor | None = None
        self._precise = torch.promote_types(parameter.dtype, torch.float32)

    def original(self) -> Tensor:
        """Return the original matrix."""
        return _whole(self._original)

    def weight(self) -> Tensor:
        """Return the live weight."""
        return _whole(self.parameter.detach())

    def delta(self) -> Tensor:
        """Return the change that the live weight carries, fp32 at least."""
        return _whole(self.parameter.detach().to(self._precise) - self._original.to(self._precise))

    @property
    def change(self) -> Tensor:
        """The sum of all steps of the optimizer, fp32 at least."""
        return self.delta() if self._withheld is None else self.delta() + _whole(self._withheld)

    def follow_steps(self) -> None:
        """Keep a copy of the weight from now on, so that :meth:`step` can return its change."""
        self._previous = self._previous if self._previous is not None else self.parameter.detach().clone()

    def step(self) -> Tensor:
        """Return the change of the weight since a restraint last wrote it."""
        assert self._previous is not None, "follow_steps() comes first"
        return _whole(self.parameter.detach().to(self._precise) - self._previous.to(self._precise))

    @torch.no_grad()
    def withhold(self, correction: LowRankUpdate | None) -> None:
        """Write the weight without ``correction``, which is recorded as withheld and stays part of :attr:`change`."""
        if correction is None and self._withheld is None:
            return
        weight = self.weight().to(self._precise, copy=True)
        before = 0.0 if self._withheld is None else _whole(self._withheld)
        # Written as a difference, so that entries which no correction touches keep their bits.
        self._write(weight + before - (0.0 if correction is None else correction.dense().to(weight)))
        rest = weight - self.weight().to(self._precise) + before
        self._withheld = None if correction is None else self._like(rest)

    @contextmanager
    def withholding(self, correction: LowRankUpdate | None) -> Iterator[None]:
        """Write the weight without ``correction`` inside the block, then restore it bit for bit."""
        saved = self.parameter.detach().clone(), self._withheld, self._previous
        self._previous = None
        self.withhold(correction)
        try:
            yield
        finally:
            with torch.no_grad():
                self.parameter.copy_(saved[0])
            _, self._withheld, self._previous = saved

    def check(self) -> None:
        """Raise a :class:`UserError` if the weight is on another device than its copy."""
        if self.parameter.device != self._original.device:
            raise UserError(
                f"{self.name} is on {self.parameter.device}, its copy on {self._original.device}: attach a restraint "
                "when the model is on its device (with Fabric: after `fabric.setup`)"
            )

    @torch.no_grad()
    def subtract(self, correction: LowRankUpdate | Tensor) -> None:
        """Subtract ``correction`` from the weight permanently."""
        dense = correction if isinstance(correction, Tensor) else correction.dense()
        self._write(self.weight().to(self._precise) - dense.to(self._precise))

    def _write(self, weight: Tensor) -> None:
        self.parameter.copy_(self._like(weight))
        if self._previous is not None:
            self._previous.copy_(self.parameter.detach())

    def _like(self, whole: Tensor) -> Tensor:
        live = self.parameter.detach()
        return distribute_tensor(whole, live.device_mesh, live.placements) if isinstance(live, DTensor) else whole

    def rounding_loss(self) -> float:
        """Return zero: an optimizer updates the stored weight itself, so no higher-precision copy exists."""
        return 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint, as whole matrices on the CPU."""
        kept = {"original": self._original, "withheld": self._withheld, "previous": self._previous}
        return {name: _whole(tensor).cpu() for name, tensor in kept.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the original and the withheld part from an earlier run."""
        here = {name: self._like(tensor.to(self.parameter.device)) for name, tensor in state.items()}
        self._original = here["original"]
        self._withheld, self._previous = here.get("withheld"), here.get("previous")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def matching_matrices(
    module: nn.Module, patterns: Sequence[str] | None, held: Mapping[str, SnapshotMatrix] | None = None
) -> dict[str, SnapshotMatrix]:
    """Return the matrices of a module to restrain. Tied matrices are returned once, under their first name.

    Args:
        module: Any module.
        patterns: ``fnmatch`` patterns of parameter names, embeddings included; ``None`` for the trained weights of all
            Linear and Conv1D layers.
        held: Matrices of this module that another callback holds already; they are shared.

    Raises:
        UserError: A pattern matches no two-dimensional parameter, or nothing is trained.
    """
    named = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.ndim == 2}
    if patterns is None:
        layers = {n: m for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, (nn.Linear, Conv1D))}
        chosen = [f"{n}.weight".lstrip(".") for n, m in layers.items() if m.weight.requires_grad]
        chosen = [name for name in chosen if name in named]
    else:
        chosen = []
        for pattern in patterns:
            found = [name for name in named if fnmatchcase(name, pattern)]
            if not found:
                raise UserError(f"restraint.parameters: no matrix matches {pattern!r}: {near(pattern, named)}")
            chosen += found
    if not chosen:
        raise UserError("the restraint finds no trained Linear or Conv1D weight; name some with `parameters`")
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    names = dict.fromkeys(first[id(named[n])] for n in chosen)
    shared = {n: m for n, m in (held or {}).items() if n in names and m.parameter is named[n]}
    return {name: shared.get(name) or SnapshotMatrix(name, named[name]) for name in names}
