"""Types that all layers of the framework share: batches of requests and weight updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prune_lightning.devices import rows_at_a_time
from prune_lightning.requests import EditRequest, Probe
from prune_lightning.text.separators import Pair

__all__ = [
    "DenseUpdate",
    "EditBatch",
    "EditReport",
    "EditRequest",
    "LowRankUpdate",
    "MatrixUpdate",
    "MemoryUpdate",
    "MetaExample",
    "Probe",
    "Update",
    "norm_of_all",
]


class EditBatch:
    """The requests of one training step.

    Not a dataclass: a Trainer's ``precision`` converts tensors inside dataclasses and fails on frozen ones.

    Args:
        requests: The facts that are written together; empty if a resumed stream is complete.
        from_base: Whether the unedited model is restored after the step (the protocols ``single`` and ``batch``).
    """

    def __init__(self, requests: tuple[EditRequest, ...], from_base: bool = False) -> None:
        self.requests, self.from_base = requests, from_base


@dataclass(frozen=True)
class MetaExample:
    """A training example of an editor: the edits of one update, and tests of generalization and locality.

    Args:
        edits: The prompt of each edit with its new target.
        rephrased: An equal number of other prompts with the new target.
        locality: Texts whose predictions should not change.
        unrelated: The same texts as they are asked: without the answers of probes.
    """

    edits: tuple[Pair, ...]
    rephrased: tuple[Pair, ...]
    locality: tuple[str, ...]
    unrelated: tuple[str, ...] = ()


@dataclass(frozen=True)
class LowRankUpdate:
    r"""A change of one weight matrix in factored form, :math:`\Delta = A B^\top`.

    The orientation is ``out_features x in_features``, regardless of how the layer stores its weight.

    Args:
        left: :math:`A`, shape ``(out_features, rank)``.
        right: :math:`B`, shape ``(in_features, rank)``.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def sum(cls, updates: Sequence[LowRankUpdate]) -> LowRankUpdate:
        """Return the sum of updates of one matrix, by concatenating their factors."""
        return cls(torch.cat([u.left for u in updates], dim=1), torch.cat([u.right for u in updates], dim=1))

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.left.shape[0], self.right.shape[0]

    def contiguous(self) -> LowRankUpdate:
        """Return the update with its factors laid out row by row, as they are read from the disk."""
        if self.left.is_contiguous() and self.right.is_contiguous():
            return self  # whose norm may be known
        return LowRankUpdate(self.left.contiguous(), self.right.contiguous())

    def to(self, device: torch.device) -> LowRankUpdate:
        """Return the update on a device."""
        return LowRankUpdate(self.left.to(device), self.right.to(device))

    def dense(self) -> Tensor:
        """Return the update as a matrix ``(out_features, in_features)``."""
        return self.left @ self.right.T

    def times(self, keys: Tensor) -> Tensor:
        r"""Return :math:`A B^\top K` for keys ``(in_features, b)``, shape ``(out_features, b)``."""
        return self.left.to(keys) @ (self.right.to(keys).T @ keys)

    def add_to(self, matrix: Tensor) -> None:
        """Add the update in place, in the precision of ``matrix``.

        The sum of outer products is computed entry by entry and in order, so that it has the same bits on every
        device: a product of matrices rounds as its BLAS library sums.
        """
        left, right = self.left.to(matrix), self.right.to(matrix)
        if not matrix.is_contiguous():
            matrix, left, right = matrix.T, right, left
        rows = rows_at_a_time(matrix)
        for block, part in zip(matrix.split(rows), left.split(rows), strict=True):
            total = torch.zeros_like(block)
            for column, row in zip(part.T, right.T, strict=True):
                total.add_(column[:, None] * row)
            block.add_(total)

    def norm(self) -> float:
        r"""Return the Frobenius norm, from the two Gram matrices: :math:`\mathrm{tr}(A^\top A\,B^\top B)^{1/2}`.

        It is computed once. Where an entry of the factors is NaN or infinite, so is the norm.
        """
        return self._norm

    @cached_property
    def _norm(self) -> float:
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())

    def is_finite(self) -> bool:
        """Whether no entry of the factors is NaN or infinite."""
        return bool(torch.isfinite(self.left).all() & torch.isfinite(self.right).all())


@dataclass(frozen=True)
class DenseUpdate:
    r"""A dense change of one weight matrix, such as that of fine-tuning.

    Args:
        matrix: :math:`\Delta`, shape ``(out_features, in_features)``, regardless of how the layer stores its weight.
    """

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def contiguous(self) -> DenseUpdate:
        """Return the update laid out row by row, as it is read from the disk."""
        return DenseUpdate(self.matrix.contiguous())

    def to(self, device: torch.device) -> DenseUpdate:
        """Return the update on a device."""
        return DenseUpdate(self.matrix.to(device))

    def dense(self) -> Tensor:
        """Return the update as a matrix ``(out_features, in_features)``."""
        return self.matrix

    def times(self, keys: Tensor) -> Tensor:
        r"""Return :math:`\Delta K` for keys ``(in_features, b)``, shape ``(out_features, b)``."""
        return self.matrix.to(keys) @ keys

    def add_to(self, matrix: Tensor) -> None:
        """Add the update in place, in the precision of ``matrix``."""
        matrix.add_(self.matrix.to(matrix))

    def norm(self) -> float:
        """Return the Frobenius norm, which is computed once; NaN or infinite where an entry is."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        return float(self.matrix.double().norm())

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return bool(torch.isfinite(self.matrix).all())


MatrixUpdate: TypeAlias = LowRankUpdate | DenseUpdate


@dataclass(frozen=True)
class MemoryUpdate:
    """What an edit adds to a memory beside the weights, such as an entry of a codebook.

    Args:
        tensors: By name; what they mean is up to the memory.
        strength: The figure that is reported as the norm of the update; see the method.
    """

    tensors: Mapping[str, Tensor]
    strength: float = 0.0

    def contiguous(self) -> MemoryUpdate:
        """Return the update laid out as it is read from the disk."""
        return replace(self, tensors={name: tensor.contiguous() for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> MemoryUpdate:
        """Return the update on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def norm(self) -> float:
        """Return :attr:`strength`."""
        return self.strength

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        finite = [torch.isfinite(tensor).all() for tensor in self.tensors.values()]
        return not finite or bool(torch.stack(finite).all())


Update: TypeAlias = MatrixUpdate | MemoryUpdate
"""What a step changes in one part of the model: a matrix, or a memory beside the weights."""


def norm_of_all(updates: Mapping[str, Update]) -> float:
    """Return the Frobenius norm of a step's update over everything that it changes."""
    return sum(update.norm() ** 2 for update in updates.values()) ** 0.5


@dataclass(frozen=True)
class EditStep:
    """A method's result for the requests of one step.

    Args:
        requests: The requests.
        updates: The update of each edited part, by name.
        details: What the method reports of each request, e.g. the steps of its value optimisation.
    """

    requests: tuple[EditRequest, ...]
    updates: Mapping[str, Update]
    details: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EditReport:
    """The report of one edit step; lists have one entry per request.

    Args:
        requests: The requests of the step.
        update_norm: Frobenius norm of the step's update over everything that it changes.
        seconds: Wall time of the step.
        details: What the method reports of each request, e.g. the steps of its value optimisation.
        applied: Whether the update was written.
        refused: The reason if it was not; else ``None``.
    """

    requests: tuple[EditRequest, ...]
    update_norm: float
    seconds: float
    details: tuple[Mapping[str, Any], ...] = ()
    applied: bool = True
    refused: str | None = None

    def figures(self) -> dict[str, float]:
        """Return what is logged of every step; and the largest ratio of a value's norm to its anchor, if known."""
        ratios = [detail["norm_ratio"] for detail in self.details if "norm_ratio" in detail]
        found = {"edit/update_norm": self.update_norm, "edit/seconds": self.seconds}
        return {**found, "value/norm_ratio": max(ratios)} if ratios else found
