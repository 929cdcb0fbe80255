r"""Cost estimates of methods and restraints, before any weight is loaded.

A method has a class method ``cost(model, stream, **options)`` that takes the options of its constructor
(:class:`SaysItsCost`), a restraint has a method ``cost(changes)`` (:class:`Changes`). Without one, only the costs of
the base classes are counted.

Notation: a matrix is :math:`m \times n` (out, in), :math:`w` bytes per weight, :math:`p = \max(w, 4)` bytes per
entry of a master.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

FP64 = 8
FACTORED_UP_TO = 0.75  # share of the smaller side: the rank up to which a change is kept in factors
Shape: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Work:
    """The work of a computation.

    Args:
        flops: Floating-point operations in the model's dtype; a multiply-add counts as two.
        moved: Bytes read and written.
        operations: Kernel calls.
        saved: Bytes saved for the backward pass, without weights.
        flops64: Floating-point operations in fp64.
    """

    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    saved: float = 0.0
    flops64: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            self.operations + other.operations,
            max(self.saved, other.saved),
            self.flops64 + other.flops64,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times, self.operations * times, self.saved, self.flops64 * times)

    def __truediv__(self, parts: float) -> Work:
        return self * (1 / parts)


@dataclass(frozen=True)
class Machine:
    """The speed of a machine.

    Args:
        flops: Operations per second in the model's dtype.
        flops64: Operations per second in fp64.
        bandwidth: Bytes per second.
        overhead: Seconds per operation, regardless of size.
    """

    flops: float
    flops64: float
    bandwidth: float
    overhead: float

    def seconds(self, work: Work) -> float:
        """Return the summed time of arithmetic, memory traffic and calls."""
        arithmetic = work.flops / self.flops + work.flops64 / self.flops64
        return arithmetic + work.moved / self.bandwidth + work.operations * self.overhead


class Shapes(Protocol):
    """A model of which only shapes are known; passes are counted but not run."""

    num_layers: int

    @property
    def weight_size(self) -> int:
        """Bytes of a weight, :math:`w`."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def positions(self) -> int | None:
        """Longest input of the model; ``None`` for no limit."""

    @property
    def kv_width(self) -> int:
        """Width of a layer's keys, and of its values, for one token."""

    def edited_shape(self, layer: int) -> Shape:
        """Return ``(out_features, in_features)`` of the down-projection of a layer."""

    def mlp_shapes(self, layer: int) -> dict[str, Shape]:
        """Return the shapes of all linear modules of a layer's MLP, by name."""

    def named_shapes(self, layer: int, names: Sequence[str]) -> list[Shape]:
        """Return the shapes of the modules of a block whose last name is one of ``names``."""

    def forward(self, rows: int, length: int, places: int) -> Work:
        """Count a whole forward pass whose LM head sees ``places`` positions."""

    def forward_until(self, layer: int, rows: int, length: int) -> Work:
        """Count a forward pass that ends above a block."""

    def step(self, layer: int, rows: int, length: int, places: int) -> Work:
        """Count the blocks above ``layer`` forwards and backwards."""

    def packed_bytes(self, layer: int) -> int:
        """Return the bytes of packed copies of the weights above ``layer``, with which a step multiplies."""


@dataclass(frozen=True)
class StreamShape:
    """The properties of a stream that determine its costs.

    Args:
        edits: Number of edits.
        batch: Requests per step.
        prompt: Mean tokens of a prompt.
        subject_end: Mean tokens of a prompt up to the subject's last one.
        target: Mean tokens of a target.
    """

    edits: int
    batch: int
    prompt: float
    subject_end: float
    target: float


@dataclass(frozen=True)
class Cost:
    """The costs of a method, besides those of the base class for every edited matrix.

    Args:
        matrices: Shapes of the edited matrices.
        rank: Rank that one edit adds to the change of a matrix; ``None`` for dense updates.
        memory: Permanent bytes on the device, by purpose.
        host: Permanent bytes in the CPU's memory, even if the device is a GPU.
        preparing: Bytes on the device before the first edit, besides weights, originals and masters; they are free when
            the edits begin.
        state: Bytes of the method's memory in a snapshot.
        peaks: Temporary bytes, by purpose; the largest counts.
        disk: Bytes on disk.
        per_edit: Work of one edit, by purpose.
        once: Work before the first edit.
        length: Tokens of the longest row.
        unknown: Whether the method has no estimate of its own computations.
    """

    matrices: Sequence[Shape]
    rank: float | None = 1.0
    memory: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)
    preparing: float = 0.0
    state: float = 0.0
    peaks: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)
    per_edit: Mapping[str, Work] = field(default_factory=dict)
    once: Work = Work()
    length: int = 0
    unknown: bool = False


@runtime_checkable
class SaysItsCost(Protocol):
    """A method with a cost estimate."""

    @classmethod
    def cost(cls, model: Shapes, stream: StreamShape, **options: Any) -> Cost:
        """Return the costs of a method with these options of its constructor."""


@dataclass(frozen=True)
class Changes:
    """The accumulated changes of the restrained matrices.

    Args:
        matrices: Their shapes.
        ranks: Number of directions of each at the end of the stream; ``None`` for dense changes.
        halfway: The same at half of the stream.
        entry: Bytes of an entry of a master, :math:`p`.
    """

    matrices: Sequence[Shape]
    ranks: Sequence[int] | None
    halfway: Sequence[int] | None
    entry: int


@dataclass(frozen=True)
class RestraintCost:
    """The costs of a restraint.

    Args:
        memory: Bytes on the device.
        per_step: Work after each step of the stream, on average.
    """

    memory: float = 0.0
    per_step: Work = Work()


def plain_restraint(changes: Changes, copies: int = 2, passes: int = 2) -> RestraintCost:
    """Return the cost of dense copies of one matrix at a time, and of some passes over each matrix."""
    sizes = [m * n * changes.entry for m, n in changes.matrices]
    return RestraintCost(
        float(copies * max(sizes, default=0)), Work(0.0, float(passes * sum(sizes)), passes * len(sizes))
    )
