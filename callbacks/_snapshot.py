"""Matrices of a module that is trained by an optimizer. Their change is the weight minus a copy of the original."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prune_lightning.errors import UserError, kind_of, near
from prune_lightning.sharding import sharded_like, whole
from prune_lightning.types import LowRankUpdate

from ._adapted import AdaptedMatrix, adapted_layers

Matrix = TypeVar("Matrix")


class SnapshotMatrix:
    r"""A trained weight with a copy of its original: :math:`\Delta = W - W_0 +` what is withheld.

    A sharded weight (``DTensor``) and its copies stay sharded. The whole matrix is gathered only while it is read, and
    every rank computes the same result from it.

    All matrices are handled as ``out_features x in_features``; what is stored is as the parameter is.

    Args:
        name: Name of the parameter.
        parameter: The live weight, two-dimensional.
        transposed: Whether the weight is stored ``in x out``, as a ``Conv1D`` stores it.
    """

    def __init__(self, name: str, parameter: nn.Parameter, transposed: bool = False) -> None:
        self.name, self.parameter, self.transposed = name, parameter, transposed
        self._original = parameter.detach().clone()
        self._withheld: Tensor | None = None
        self._previous: Tensor | None = None
        self._precise = torch.promote_types(parameter.dtype, torch.float32)

    def _turned(self, stored: Tensor) -> Tensor:
        """Return a whole matrix in the other of the two layouts, or as it is if they are the same."""
        return stored.T if self.transposed else stored

    def original(self) -> Tensor:
        """Return the original matrix."""
        return self._turned(whole(self._original))

    def weight(self) -> Tensor:
        """Return the live weight."""
        return self._turned(whole(self.parameter.detach()))

    def delta(self) -> Tensor:
        """Return the change that the live weight carries, fp32 at least."""
        return self._turned(whole(self.parameter.detach().to(self._precise) - self._original.to(self._precise)))

    @property
    def change(self) -> Tensor:
        """The sum of all steps of the optimizer, fp32 at least."""
        return self.delta() if self._withheld is None else self.delta() + self._turned(whole(self._withheld))

    def follow_steps(self) -> None:
        """Keep a copy of the weight from now on, so that :meth:`step` can return its change."""
        self._previous = self._previous if self._previous is not None else self.parameter.detach().clone()

    def step(self) -> Tensor:
        """Return the change of the weight since a restraint last wrote it."""
        assert self._previous is not None, "follow_steps() comes first"
        return self._turned(whole(self.parameter.detach().to(self._precise) - self._previous.to(self._precise)))

    def gradient(self) -> Tensor | None:
        """Return the gradient of the weight, or ``None`` if it has none."""
        return None if self.parameter.grad is None else self._turned(whole(self.parameter.grad.detach()))

    @torch.no_grad()
    def write_gradient(self, gradient: Tensor) -> None:
        """Replace the gradient of the weight."""
        assert self.parameter.grad is not None
        self.parameter.grad.copy_(sharded_like(self._turned(gradient), self.parameter.detach()))

    @torch.no_grad()
    def withhold(self, correction: LowRankUpdate | None) -> None:
        """Write the weight without ``correction``, which is recorded as withheld and stays part of :attr:`change`."""
        if correction is None and self._withheld is None:
            return
        weight = self.weight().to(self._precise, copy=True)
        before = 0.0 if self._withheld is None else self._turned(whole(self._withheld))
        # Written as a difference, so that entries which no correction touches keep their bits.
        self._write(weight + before - (0.0 if correction is None else correction.dense().to(weight)))
        rest = weight - self.weight().to(self._precise) + before
        self._withheld = None if correction is None else sharded_like(self._turned(rest), self.parameter.detach())

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
        self.parameter.copy_(sharded_like(self._turned(weight), self.parameter.detach()))
        if self._previous is not None:
            self._previous.copy_(self.parameter.detach())

    def rounding_loss(self) -> float:
        """Return zero: an optimizer updates the stored weight itself, so no higher-precision copy exists."""
        return 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint, as whole matrices on the CPU."""
        kept = {"original": self._original, "withheld": self._withheld, "previous": self._previous}
        return {name: whole(tensor).cpu() for name, tensor in kept.items() if tensor is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the original and what was withheld; a state without a previous weight leaves that as it is."""
        live = self.parameter.detach()
        here = {name: sharded_like(tensor.to(live.device), live) for name, tensor in state.items()}
        self._original = here["original"]
        self._withheld, self._previous = here.get("withheld"), here.get("previous", self._previous)


class Originals:
    """The originals of parameters that were held before, for as long as these parameters exist."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[nn.Parameter], dict[str, Tensor]]] = []

    def keep(self, matrices: Iterable[object]) -> None:
        """Remember the originals of matrices that are about to be given up, and what is withheld of them."""
        held = {id(m.parameter): m for m in matrices if isinstance(m, SnapshotMatrix)}
        self._known = [entry for entry in self._known if (p := entry[0]()) is not None and id(p) not in held]
        for matrix in held.values():
            # The previous weight goes: what happens between two trainings is no step.
            state = {name: tensor for name, tensor in matrix.state_dict().items() if name != "previous"}
            self._known.append((weakref.ref(matrix.parameter), state))

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor] | None:
        """Return what is known of a parameter, by its identity."""
        return next((state for known, state in self._known if known() is parameter), None)


def as_patterns(parameters: str | Sequence[str] | None) -> list[str] | None:
    """Return patterns as a list; a single string is one pattern.

    Raises:
        UserError: They are not texts.
    """
    if parameters is None or isinstance(parameters, str):
        return None if parameters is None else [parameters]
    if not isinstance(parameters, Iterable) or not all(isinstance(pattern, str) for pattern in parameters):
        raise UserError(
            "`parameters` is expected to be names of parameters, or patterns such as '*.weight', but got "
            f"{kind_of(parameters)}"
        )
    return list(parameters)


def chosen_matrices(matrices: Mapping[str, Matrix], patterns: Sequence[str] | None) -> dict[str, Matrix]:
    """Return the matrices under edit that a restraint is to watch.

    Raises:
        UserError: A pattern matches none of them.
    """
    if patterns is None or not matrices:
        return dict(matrices)
    found = {pattern: [name for name in matrices if fnmatchcase(name, pattern)] for pattern in patterns}
    if unknown := [pattern for pattern, names in found.items() if not names]:
        raise UserError(f"restraint.parameters: no edited matrix matches {unknown[0]!r}: {near(unknown[0], matrices)}")
    return {name: matrix for name, matrix in matrices.items() if any(name in names for names in found.values())}


def matching_matrices(
    module: nn.Module, patterns: Sequence[str] | None, held: Mapping[str, SnapshotMatrix] | None = None
) -> dict[str, SnapshotMatrix | AdaptedMatrix]:
    """Return the matrices of a module that a restraint is to watch, tied ones once, under their first name.

    The base weight of a LoRA layer and its factors all stand for the merged weight, which goes by the name of the base
    weight.

    Args:
        module: Any module.
        patterns: ``fnmatch`` patterns of parameter names, embeddings included; ``None`` for the trained weights of all
            Linear, Conv1D and LoRA layers.
        held: Matrices of this module that somebody holds already; they are shared.

    Raises:
        UserError: A pattern matches no two-dimensional parameter, or only frozen ones, or nothing is trained.
    """
    named = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.ndim == 2}
    adapted = {name: found for name, found in adapted_layers(module).items() if name in named}
    if patterns is None:
        layers = {n: m for n, m in module.named_modules(remove_duplicate=False) if isinstance(m, (nn.Linear, Conv1D))}
        chosen = [f"{n}.weight".lstrip(".") for n, m in layers.items() if m.weight.requires_grad]
        chosen = [name for name in chosen if name in named]
    else:
        chosen = [name for pattern in patterns for name in _matches(pattern, named, adapted)]
    if not chosen:
        raise UserError("the restraint finds no trained Linear or Conv1D weight; name some with `parameters`")
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    result: dict[str, SnapshotMatrix | AdaptedMatrix] = {}
    for name in chosen:
        if name in adapted:
            base, layer = adapted[name]
            result[base] = result.get(base) or AdaptedMatrix(base, layer)
        else:
            name = first[id(named[name])]
            known = result.get(name) or (held or {}).get(name)
            shared = isinstance(known, SnapshotMatrix) and known.parameter is named[name]
            transposed = isinstance(module.get_submodule(name.rpartition(".")[0]), Conv1D)
            result[name] = known if known and shared else SnapshotMatrix(name, named[name], transposed)
    return result


def _matches(pattern: str, named: Mapping[str, nn.Parameter], adapted: Mapping[str, object]) -> list[str]:
    found = [name for name in named if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"restraint.parameters: no matrix matches {pattern!r}: {near(pattern, named)}")
    if not any(named[name].requires_grad or name in adapted for name in found):
        raise UserError(
            f"restraint.parameters: {pattern!r} matches frozen weights only, such as {found[0]}, which training does "
            "not change; name weights that are trained, or let them require a gradient before training starts"
        )
    return found
