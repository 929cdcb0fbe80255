r"""Estimates the needs of a run: those of the base classes plus those of its method and its restraint.

Notation as in :mod:`prune_lightning.costs`; besides, :math:`N` edits, and :math:`k = \min(rN, \tfrac34\min(m, n))`
the number of directions up to which a change is kept in factors, for updates of rank :math:`r`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_lightning.costs import (
    FACTORED_UP_TO,
    FP64,
    Changes,
    Cost,
    Machine,
    RestraintCost,
    SaysItsCost,
    Shapes,
    StreamShape,
    Work,
)


def method_cost(kind: type, model: Shapes, stream: StreamShape, options: Mapping[str, Any]) -> Cost:
    """Return a method's costs; a method without ``cost`` is assumed to edit the down-projections of its layers.

    Args:
        kind: The method's class.
        model: The model's shapes.
        stream: The stream's.
        options: Arguments of the method's constructor, without the model.
    """
    if isinstance(kind, SaysItsCost):
        return kind.cost(model, stream, **options)
    layers = options.get("layers")
    shapes = [model.edited_shape(layer) for layer in (range(model.num_layers) if layers is None else layers)]
    return Cost(shapes, unknown=True)


def changes(cost: Cost, model: Shapes, stream: StreamShape) -> Changes:
    """Return the shapes and ranks of a stream's accumulated changes."""
    entry = max(model.weight_size, 4)
    if cost.rank is None:
        return Changes(cost.matrices, None, None, entry)
    ranks, halfway = (
        [min(int(count * cost.rank), int(FACTORED_UP_TO * min(shape))) for shape in cost.matrices]
        for count in (stream.edits, stream.edits // 2)
    )
    return Changes(cost.matrices, ranks, halfway, entry)


def memory(weights: float, cost: Cost, restraint: RestraintCost, kept: Changes, w: int) -> dict[str, float]:
    r"""Return bytes on the device, by purpose.

    - weights: all parameters and buffers once
    - originals :math:`mnw` and masters :math:`mnp` of the edited matrices; the step's copy :math:`mnw` and one dense
      update :math:`2mnp` for the moment of writing, of one matrix at a time
    - factors: two bases in stores that double, :math:`2(m+n)k` fp64, and a core :math:`k^2`; none of dense updates
    - the needs of the method and the restraint
    - the largest peak: writing, one of the method, or what its preparation needs beyond all of this

    Args:
        weights: Bytes of the model.
        cost: The method's.
        restraint: The restraint's.
        kept: The accumulated changes.
        w: Bytes of a weight.
    """
    size = sum(m * n for m, n in cost.matrices)
    found = {"weights": weights, "originals of edited matrices": float(size * w)}
    found["masters of changes"] = float(size * kept.entry)
    later = {**cost.memory, "restraint": restraint.memory}
    if kept.ranks is not None:
        later = {"factors of changes": _factors(cost, kept, stores=2)} | later
    writing = size * w + 4 * max((m * n for m, n in cost.matrices), default=0) * kept.entry
    moments = {"writing": float(writing), **cost.peaks, "preparation": cost.preparing - sum(later.values())}
    largest = max(moments, key=lambda name: moments[name])
    return _of_matrices(cost, found | later | {f"largest moment: {largest}": moments[largest]})


def _factors(cost: Cost, kept: Changes, stores: int) -> float:
    """Return bytes of the factors; the stores of their bases may be larger than the bases."""
    ranks = zip(cost.matrices, kept.ranks or (), strict=False)
    return float(sum(stores * (m + n) * k + k * k for (m, n), k in ranks) * FP64)


def snapshot(cost: Cost, kept: Changes) -> float:
    """Return bytes of a snapshot: masters and factors of the changes, and the method's memory."""
    return float(sum(m * n * kept.entry for m, n in cost.matrices)) + _factors(cost, kept, stores=1) + cost.state


def host(cost: Cost, kept: Changes) -> dict[str, float]:
    """Return bytes in the CPU's memory, by purpose: the method's, and the copy from which a snapshot is written."""
    return _of_matrices(cost, {**cost.host, "copy for a snapshot": snapshot(cost, kept)})


def disk(cost: Cost, stream: StreamShape, kept: Changes) -> dict[str, float]:
    """Return bytes on disk.

    - the ledger: updates in fp64 factors, or dense in the master's precision; the latest two snapshots and the last
    - those of the method
    """
    if cost.rank is None:
        ledger = -(-stream.edits // stream.batch) * sum(m * n for m, n in cost.matrices) * float(kept.entry)
    else:
        ledger = stream.edits * cost.rank * sum((m + n) * FP64 for m, n in cost.matrices)
    found = {"ledger of edits": float(ledger), "snapshots": 3 * snapshot(cost, kept), **cost.disk}
    return _of_matrices(cost, found)


def time(
    cost: Cost, restraint: RestraintCost, stream: StreamShape, kept: Changes, machine: Machine
) -> dict[str, float]:
    """Return seconds per edit, by purpose; writing is ten passes over each matrix."""
    rank = cost.rank or 0.0
    writing = Work()
    for m, n in cost.matrices:
        writing = writing + Work(4.0 * m * n * rank * stream.batch, 10.0 * m * n * kept.entry, 20)
    work = {**cost.per_edit, "writing": writing / stream.batch, "restraint": restraint.per_step / stream.batch}
    return _of_matrices(cost, {name: machine.seconds(each) for name, each in work.items()})


def _of_matrices(cost: Cost, found: dict[str, float]) -> dict[str, float]:
    """Leave out what only matrices need, if no matrix is edited."""
    return found if cost.matrices else {name: amount for name, amount in found.items() if amount}
