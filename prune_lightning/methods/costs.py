"""Cost estimates shared by several methods: value optimisation with second moments, and training with Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prune_lightning.costs import FP64, Cost, Shape, Shapes, StreamShape, Work
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.second_moment import Keep
from prune_lightning.models.statistics import SecondMoments


class ValueRows:
    """The token rows of one value optimisation.

    Args:
        stream: The stream.
        contexts: The prefixes.
        value: Options of the optimisation.
        requests: Requests whose values may be optimised together.
    """

    def __init__(self, stream: StreamShape, contexts: ContextOptions, value: ValueOptions, requests: int) -> None:
        sizes = [(0, 1), *((size, count) for size, count in contexts.lengths or ())]
        if contexts.fixed is not None:
            sizes = [(0, 1), *((len(text) // 4, 1) for text in contexts.fixed)]
        self.prefixes = sum(count for _, count in sizes)
        self.length = math.ceil(max(size for size, _ in sizes) + 2 + stream.prompt + stream.target - 1)
        self.after = math.ceil(stream.prompt - stream.subject_end + stream.target)
        self.together = max(1, min(requests, value.token_budget // ((self.prefixes + 1) * self.length)))
        self.rows = self.together * (self.prefixes + 1)  # every prefix, and the divergence's row
        self.places = self.together * (self.prefixes * math.ceil(stream.target) + 1)  # whose logits are read


def locating_cost(
    model: Shapes,
    stream: StreamShape,
    *,
    layers: Sequence[int],
    second_moments: SecondMoments,
    value: ValueOptions,
    contexts: ContextOptions,
    one_by_one: bool,
) -> Cost:
    r"""Return the costs of a locate-then-edit method.

    - memory: second moments :math:`n^2` and their Cholesky factors :math:`n^2`, fp64 if nothing else is said, on the
      device or in the CPU's memory
    - before the first edit: half-way and final sums, :math:`n^2` fp64 a layer each, a temporary one, and a forward
      pass; if they are in the CPU's memory, three matrices while one is factorised
    - packed copies of the weights above the last edited layer, on a CPU
    - peak of the values: what the backward pass keeps (counted), keys and values of the whole rows, and five copies of
      the logits that are read, fp32
    - values: one whole forward pass and a check of the upper part, then ``steps`` passes through the upper part and
      back; at most, since a value whose loss is small ends early
    - keys: passes up to the edited layer, over rows that end at the subject; batch methods walk once more through the
      layers between the first and the last
    - solving: two triangular systems :math:`n^2 b` in fp64, the factor read once
    - statistics: a forward pass to the last edited layer, :math:`2 n^2` fp64 a token; on disk :math:`n^2` fp32 a layer,
      :math:`2 n^2` fp64 more while the pass is under way

    Args:
        model: The model's shapes.
        stream: The stream's.
        layers: Edited layers.
        second_moments: Where the second moments come from.
        value: Options of the value optimisation.
        contexts: The prefixes.
        one_by_one: Whether each request and each layer is optimised separately (ROME and its variants).
    """
    shapes = [model.edited_shape(layer) for layer in layers]
    batch = 1 if one_by_one else stream.batch
    rows, last, w = ValueRows(stream, contexts, value, batch), max(layers), model.weight_size
    step = model.step(last, rows.rows, rows.after, rows.places)
    kv = 2 * model.num_layers * rows.rows * rows.length * model.kv_width * w
    whole = model.forward(rows.rows, rows.length, rows.places)
    before = max(1, rows.length - rows.after + 1)
    keys = model.forward_until(last, batch * rows.prefixes, before) / batch
    values = (whole + step * (value.steps + 0.4)) / rows.together
    if one_by_one:
        values, keys = values * len(shapes), keys * len(shapes)
    else:
        keys = keys * (1 + (last - min(layers)) / (last + 1))
    packed = model.packed_bytes(last) if value.fast else 0
    found = Cost(
        shapes,
        memory={"packed weights": float(packed)} if packed else {},
        peaks={"values": step.saved + kv + 5 * rows.places * model.vocabulary * 4},
        per_edit={"values": values, "keys": keys, "solving": solving(shapes, batch)},
        length=rows.length,
    )
    size = FP64 if second_moments.keep.on_cpu else second_moments.keep.size  # the sums of the pass are fp64
    held = {"second moments": float(sum(2 * n * n * size for _, n in shapes))}
    return with_statistics(_kept(found, held, second_moments.keep), model, layers, second_moments)


def _kept(cost: Cost, held: Mapping[str, float], keep: Keep) -> Cost:
    """Add what is kept, on the device or in the CPU's memory."""
    if keep.on_cpu:
        return replace(cost, host={**cost.host, **held})
    return replace(cost, memory={**cost.memory, **held})


def solving(shapes: Sequence[Shape], batch: int, passes: int = 1) -> Work:
    """Return the work of solving for one edit of a batch.

    Args:
        shapes: Of the edited matrices.
        batch: Requests of a step.
        passes: 1 for a fixed factor; 2 where an inverse grows with the edits, which is written, too.
    """
    flops = sum(2.0 * n * n * batch * passes for _, n in shapes)
    moved = sum(n * n * FP64 * (2 * passes - 1) for _, n in shapes)
    return Work(0.0, moved, 20 * len(shapes), flops64=flops) / batch


def protecting(cost: Cost, kept: int, batch: int, keep: Keep) -> Cost:
    """Add the costs of growing inverses.

    Args:
        cost: Costs without them.
        kept: Number of permanent matrices of :math:`n^2` per layer.
        batch: Requests of a step.
        keep: How they are kept.
    """
    held = {"protected keys": float(sum(kept * n * n * FP64 for _, n in cost.matrices))}
    work = {"solving": solving(cost.matrices, batch, passes=2)}
    squares = [float(n * n * FP64) for _, n in cost.matrices]
    # The first inverse of a layer, or its null space, is computed in fp64 on the device from what is kept.
    making = (2 if keep == Keep() else 5) * max(squares)
    found = replace(_kept(cost, held, keep), per_edit={**cost.per_edit, **work})
    return replace(found, peaks={**cost.peaks, "inverses": making}, state=cost.state + sum(squares))


def with_statistics(cost: Cost, model: Shapes, layers: Sequence[int], moments: SecondMoments) -> Cost:
    """Add the cost of computing the second moments. This is an upper bound: they may be cached already."""
    if not moments.corpus:
        return cost
    shapes = cost.matrices
    longest = min(moments.max_length, model.positions or moments.max_length)
    if sampled := isinstance(moments.corpus, str):
        longest = min(longest, moments.sampled.length)
    tokens = moments.num_texts(max(n for _, n in shapes)) * longest
    tokens = min(tokens, moments.max_tokens or tokens)
    rows = max(1, moments.token_budget // longest)
    sums = Work(flops64=sum(2.0 * n * n for _, n in shapes) * rows * longest)
    once = (model.forward_until(max(layers), rows, longest) + sums) * (tokens / (rows * longest))
    if sampled:
        once = once + model.forward_until(model.num_layers - 1, rows, longest) * (tokens / (rows * longest))
    hidden = moments.token_budget * (shapes[0][1] * FP64 * len(shapes) + 8 * model.hidden_size * model.weight_size)
    disk = {}
    if moments.cache:
        disk["statistics, kept"] = float(sum(4 * n * n for _, n in shapes))
        disk["statistics, under way"] = float(sum(2 * n * n * FP64 for _, n in shapes))
    squares = [float(n * n * FP64) for _, n in shapes]
    preparing = hidden + 2 * sum(squares) + max(squares)
    if moments.keep.on_cpu:
        preparing = max(hidden, 3 * max(squares))
    return replace(cost, preparing=preparing, disk=disk, once=once)


def training_cost(
    model: Shapes,
    stream: StreamShape,
    *,
    layers: Sequence[int],
    matrices: Sequence[Shape],
    rank: float | None,
    trained: float,
    steps: int,
    batch_size: int,
    at_output: bool = False,
) -> Cost:
    r"""Return the costs of a method that trains parameters with Adam on the targets of each edit.

    - temporary memory: the trained parameters, their gradient, two moments of Adam, and the saved activations
    - packed copies of the weights above the block, on a CPU, if only one output is trained
    - training: ``steps`` passes from the lowest trained block upwards and back, after one pass up to it

    Args:
        model: The model's shapes.
        stream: The stream's.
        layers: Blocks with something that is trained, ascending.
        matrices: Shapes of the edited matrices.
        rank: Rank that an edit adds to a matrix; ``None`` for dense updates.
        trained: Bytes of what is trained.
        steps: Passes over the requests of an edit.
        batch_size: Requests per step of Adam.
        at_output: Whether what is trained changes the output of one down-projection, see
            :class:`~.tuning_problem.UpperOutput`.
    """
    packed = model.packed_bytes(layers[0]) if at_output else 0
    together = min(stream.batch, batch_size)
    length, places = math.ceil(stream.prompt + stream.target - 1), together * math.ceil(stream.target)
    step = model.step(layers[0], together, length, places)
    training = (step * steps + model.forward_until(layers[0], together, length)) / together
    logits = 5 * places * model.vocabulary * 4
    return Cost(
        matrices,
        rank=rank,
        memory={"packed weights": float(packed)} if packed else {},
        peaks={"training": 4 * trained + step.saved + logits},
        per_edit={"training": training},
        length=length,
    )
