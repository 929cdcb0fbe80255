r"""What a run will need, as formulas in shapes. Every one of them is here.

Notation: an edited matrix is :math:`m \times n` (out, in), :math:`w` bytes per weight, :math:`p = \max(w, 4)` bytes
per entry of a master, :math:`N` edits, :math:`k = \min(N, \tfrac34\min(m, n))` directions up to which a change is kept
in factors, :math:`b` requests per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune_lightning.tasks.counting import ShapeModel, Work

FP64 = 8
_KEPT_UP_TO = 0.75


@dataclass(frozen=True)
class Setting:
    """What of a configuration matters for its costs.

    Args:
        layers: Edited layers.
        edits: :math:`N`.
        batch: :math:`b`, requests per step.
        one_by_one: Each request and each layer has an optimisation of its own (ROME and its kin).
        prefixes: Rows per request that carry a target, the clean prompt included.
        length: Tokens of the longest row.
        after: Tokens from the subject's last one to the end of a row.
        target: Tokens of a target.
        steps: Steps of the value optimisation.
        token_budget: Padded tokens that are optimised together.
        past_keys: The method keeps the inverse of a matrix that grows (AlphaEdit, MEMIT with past keys).
        null_space: The method keeps the eigenvectors of the null space (AlphaEdit).
        restraint: ``factors`` (the spectral ones), ``dense`` (RECT), or ``none``.
        corpus_tokens: Tokens of the statistics corpus at most; zero for none.
        corpus_length: Longest piece of a text.
        corpus_batch: Tokens per forward pass of the statistics.
        keeps_statistics: Whether they are kept on disk.
    """

    layers: Sequence[int]
    edits: int
    batch: int
    one_by_one: bool
    prefixes: int
    length: int
    after: int
    target: int
    steps: int
    token_budget: int
    past_keys: bool
    null_space: bool
    restraint: str
    corpus_tokens: int
    corpus_length: int
    corpus_batch: int
    keeps_statistics: bool

    @property
    def together(self) -> int:
        """Requests whose values are optimised together: as many as the token budget holds, one at least."""
        wanted = 1 if self.one_by_one else self.batch
        return max(1, min(wanted, self.token_budget // ((self.prefixes + 1) * self.length)))

    @property
    def rows(self) -> int:
        """Token rows of one optimisation: every prefix, and the divergence's row."""
        return self.together * (self.prefixes + 1)

    @property
    def places(self) -> int:
        """Positions whose logits are read: the target's tokens in each row, the subject in the divergence's."""
        return self.together * (self.prefixes * self.target + 1)


@dataclass(frozen=True)
class Machine:
    """How fast a machine is.

    Args:
        flops: Per second, in the model's dtype.
        flops64: Per second, in fp64.
        bandwidth: Bytes per second.
        overhead: Seconds per operation, however small.
    """

    flops: float
    flops64: float
    bandwidth: float
    overhead: float

    def seconds(self, work: Work, double: bool = False) -> float:
        """Return arithmetic, memory traffic and calls of some work, one after another."""
        rate = self.flops64 if double else self.flops
        return work.flops / rate + work.moved / self.bandwidth + work.operations * self.overhead


def memory(model: ShapeModel, setting: Setting) -> dict[str, float]:
    r"""Return bytes on the device, by what they are for.

    - weights: all parameters and buffers once
    - originals :math:`mnw` and masters :math:`mnp` of the edited matrices; the step's copy :math:`mnw` and one dense
      update :math:`2mnp` for the moment of writing, of one matrix at a time
    - factors: two bases in stores that double, :math:`2(m+n)k` fp64, and a core :math:`k^2`
    - second moments :math:`n^2` fp64 and their Cholesky factors :math:`n^2`; inverses of growing matrices another
      :math:`n^2`; AlphaEdit's eigenvectors up to :math:`n^2`
    - restraint: :math:`(m+n)k + 3k^2` fp64 for triplets above the threshold, of one matrix at a time, and the withheld
      :math:`(m+n)k` of each; RECT five dense copies of one matrix
    - the larger of two peaks: statistics (sums, half-way sums and the result, :math:`3n^2` fp64 a layer, less what is
      counted above, and a forward pass), and the value optimisation: what the backward pass keeps (counted), the keys
      and values of the whole rows, and five copies of the logits that are read, fp32
    """
    w = torch.finfo(model.dtype).bits // 8
    p = max(w, 4)
    shapes = [model.edited_shape(layer) for layer in setting.layers]
    rank = [min(setting.edits, int(_KEPT_UP_TO * min(shape))) for shape in shapes]
    found = {"weights": float(model.weight_bytes)}
    found["originals of edited matrices"] = float(sum(m * n * w for m, n in shapes))
    found["masters of changes"] = float(sum(m * n * p for m, n in shapes))
    found["factors of changes"] = float(
        sum((2 * (m + n) * k + k * k) * FP64 for (m, n), k in zip(shapes, rank, strict=True))
    )
    found["second moments"] = float(sum(2 * n * n * FP64 for _, n in shapes))
    if setting.past_keys or setting.null_space:
        kept = int(setting.past_keys) + int(setting.null_space)
        found["protected keys"] = float(sum(kept * n * n * FP64 for _, n in shapes))
    found["restraint"] = _restraint_bytes(setting, shapes, rank, p)
    largest = max(m * n for m, n in shapes)
    writing = sum(m * n * w for m, n in shapes) + 4 * largest * p
    step = _step(model, setting)
    kv = 2 * model.num_layers * setting.rows * setting.length * _kv_width(model) * w
    logits = 5 * setting.places * model.config.vocab_size * 4
    statistics = 0.0
    if setting.corpus_tokens:
        hidden = setting.corpus_batch * (shapes[0][1] * FP64 * len(shapes) + 8 * model.config.hidden_size * w)
        statistics = sum(n * n * FP64 for _, n in shapes) + hidden
    found["largest step: statistics or values"] = max(statistics, step.saved + kv + logits, writing)
    return found


def _restraint_bytes(setting: Setting, shapes: Sequence[tuple[int, int]], rank: Sequence[int], p: int) -> float:
    if setting.restraint == "none":
        return 0.0
    if setting.restraint == "dense":
        return 5.0 * max(m * n for m, n in shapes) * p
    sizes = [((m + n) * k, 3 * k * k) for (m, n), k in zip(shapes, rank, strict=True)]
    return float(FP64 * (sum(a for a, _ in sizes) + max(a + b for a, b in sizes)))


def _kv_width(model: ShapeModel) -> int:
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * size)


def disk(model: ShapeModel, setting: Setting) -> dict[str, float]:
    r"""Return bytes on disk.

    - ledger: the factors of every edit in fp64, :math:`(m+n)` per edit and matrix
    - statistics: :math:`n^2` fp32 a layer when finished, :math:`2n^2` fp64 more while a pass is under way
    """
    shapes = [model.edited_shape(layer) for layer in setting.layers]
    found = {"ledger of edits": float(setting.edits * sum((m + n) * FP64 for m, n in shapes))}
    if setting.keeps_statistics and setting.corpus_tokens:
        found["statistics, kept"] = float(sum(4 * n * n for _, n in shapes))
        found["statistics, under way"] = float(sum(2 * n * n * FP64 for _, n in shapes))
    return found


def _step(model: ShapeModel, setting: Setting) -> Work:
    layer = max(setting.layers)
    return model.step(layer, setting.rows, setting.after, setting.places)


def time(model: ShapeModel, setting: Setting, machine: Machine) -> dict[str, float]:
    r"""Return seconds per edit, by what they go to; at most, since a value whose loss is small ends early.

    - values: one whole forward pass and a check of the upper part, then ``steps`` passes through the upper part and
      back
    - keys: passes up to the edited layer, over rows that end at the subject; the batch methods walk once more through
      the layers between the first and the last
    - solving: two triangular systems :math:`n^2 b` or a product with an inverse :math:`2 n^2 b` in fp64, the factor
      read once; with past keys the same again and a write of the inverse
    - writing: ten passes over each edited matrix
    - restraint: :math:`4(m+n)k + 20k^3` in fp64 a matrix for a full decomposition of the core at half of the stream;
      nothing like it where a norm certifies that nothing exceeds the reference. RECT: ten passes over each matrix
    """
    shapes = [model.edited_shape(layer) for layer in setting.layers]
    p = max(torch.finfo(model.dtype).bits // 8, 4)
    step = _step(model, setting)
    whole = model.forward(setting.rows, setting.length, setting.places)
    values = machine.seconds(whole + step * (setting.steps + 0.4)) / setting.together
    before = max(1, setting.length - setting.after + 1)
    batch = 1 if setting.one_by_one else setting.batch
    keys = machine.seconds(model.forward_until(max(setting.layers), batch * setting.prefixes, before))
    if setting.one_by_one:
        values, keys = values * len(shapes), keys * len(shapes)
    else:
        walked = 1 + (max(setting.layers) - min(setting.layers)) / (max(setting.layers) + 1)
        keys *= walked
    passes = 2 if setting.past_keys else 1
    solving = sum(
        machine.seconds(Work(2.0 * n * n * batch * passes, n * n * FP64 * (2 * passes - 1), 20), True)
        for _, n in shapes
    )
    writing = sum(machine.seconds(Work(4.0 * m * n * batch, 10 * m * n * p, 20)) for m, n in shapes)
    return {
        "values": values,
        "keys": keys / batch,
        "solving": solving / batch,
        "writing": writing / batch,
        "restraint": sum(_restraint_seconds(setting, shape, machine, p) for shape in shapes) / batch,
    }


def _restraint_seconds(setting: Setting, shape: tuple[int, int], machine: Machine, p: int) -> float:
    m, n = shape
    if setting.restraint == "none":
        return 0.0
    if setting.restraint == "dense":
        return machine.seconds(Work(0.0, 10.0 * m * n * p, 10))
    k = min(setting.edits // 2, int(_KEPT_UP_TO * min(shape)))
    return machine.seconds(Work(4.0 * (m + n) * k + 20.0 * k**3, 2.0 * m * n * p, 50), True)


def statistics_time(model: ShapeModel, setting: Setting, machine: Machine) -> float:
    r"""Return seconds of a pass over the corpus: forward to the last edited layer, :math:`2n^2` fp64 a token."""
    if not setting.corpus_tokens:
        return 0.0
    rows = max(1, setting.corpus_batch // setting.corpus_length)
    forward = model.forward_until(max(setting.layers), rows, setting.corpus_length)
    shapes = [model.edited_shape(layer) for layer in setting.layers]
    sums = Work(sum(2.0 * n * n for _, n in shapes) * rows * setting.corpus_length)
    return (
        (machine.seconds(forward) + machine.seconds(sums, True))
        * setting.corpus_tokens
        / (rows * setting.corpus_length)
    )
