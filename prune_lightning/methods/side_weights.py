"""WISE's side memories: copies of one weight matrix, and which of them answers a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from prune_lightning.methods.deciding_memory import DecidingMemory
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import apart
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading

Activation = Callable[[Tensor], Tensor]


def distances(activation: Activation, output: Tensor, added: Tensor) -> Tensor:
    r"""Return :math:`\| a(W x) - a(W' x) \|` at every token, shape ``(...,)``.

    Args:
        activation: :math:`a`.
        output: :math:`W x`, shape ``(..., out_features)``.
        added: :math:`(W' - W) x`. Added to ``output``, so that the difference is exactly zero where nothing was added.
    """
    return torch.linalg.vector_norm(activation(output + added) - activation(output), dim=-1)


def ties(changes: Tensor, density: float) -> Tensor:
    """Merge changes of a matrix by TIES: trim each, elect a sign for every entry, and average what agrees with it.

    Args:
        changes: Shape ``(n, out_features, in_features)``.
        density: Share of the entries that are kept of each, the largest in magnitude.
    """
    flat = changes.flatten(1)
    kept = max(1, round(density * flat.shape[1]))
    top = flat.abs().topk(kept, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top))
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    count = (agrees & (trimmed != 0)).sum(0).clamp_min(1)
    return (trimmed.where(agrees, 0).sum(0) / count).view(changes.shape[1:])


@dataclass(frozen=True)
class Sharding:
    """How edits are spread over side memories, and when one answers.

    Args:
        ratio: Share of the smallest distance of an edit from which on a prompt is answered.
        share: Share of the entries that a shard trains.
        shard: Edits of a shard.
        merged: Shards that are merged.
        density: See :func:`ties`.
        seed: Seed of the parts that are trained.
    """

    ratio: float = 0.88
    share: float = 0.2
    shard: int = 500
    merged: int = 2
    density: float = 0.53
    seed: int = 0


class SideWeights(DecidingMemory):
    r"""Side memories :math:`W'_k = W + D_k` of one linear module.

    A shard of edits trains one of them, in a random part of its entries. After ``merged`` shards they become one, by
    :func:`ties`. A prompt is answered by the memory whose mean distance over the prompt's tokens is the largest among
    those where it reaches ``ratio`` times the smallest distance of an edit in that memory, and by :math:`W` if there is
    none.

    Args:
        name: Path of the module.
        language_model: The model.
        activation: :math:`a` of :func:`distances`.
        sharding: See :class:`Sharding`.
    """

    inseparable = "WISE trains the edits of a shard into the same weights, one on top of the other"

    def __init__(self, name: str, language_model: LanguageModel, activation: Activation, sharding: Sharding) -> None:
        self.host = language_model.model.get_submodule(name)
        self.activation, self.sharding = activation, sharding
        self._trained: tuple[int, Tensor] | None = None
        super().__init__(name, language_model)

    @property
    def weight(self) -> Tensor:
        """:math:`W`, ``out_features x in_features``, fp32 at least."""
        weight = cast(Tensor, self.host.weight).detach()
        weight = weight.T if stores_transposed(self.host) else weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    # -- the state ------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget everything."""
        weight = self.weight
        self.changes = weight.new_zeros(0, *weight.shape)
        self.least = weight.new_zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.long, device=weight.device)  # edits of each, the last one grows

    def _is_full(self) -> bool:
        return not len(self.counts) or int(self.counts[-1]) >= self.sharding.shard

    def current(self) -> Tensor:
        """Return the change of the memory that the next edit is trained into: zero if it begins a shard."""
        return torch.zeros_like(self.weight) if self._is_full() else self.changes[-1]

    def trained(self) -> Tensor:
        """Return which entries the next edit trains, ``out_features x in_features``."""
        number = int(self.counts.sum()) // self.sharding.shard
        if self._trained is None or self._trained[0] != number or self._trained[1].device != self.device:
            generator = torch.Generator().manual_seed(self.sharding.seed + number)
            chosen = torch.rand(self.weight.shape, generator=generator) < self.sharding.share
            self._trained = number, chosen.to(self.device)
        return self._trained[1]

    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the edits of a step, one after another: what they leave of the memory, and their distances."""
        for number, (kept, least) in enumerate(zip(tensors["kept"].tolist(), tensors["least"], strict=True)):
            change = self.after(tensors[f"values.{number}"], kept)
            if self._is_full():
                self.changes = torch.cat([self.changes, change[None]])
                self.least = torch.cat([self.least, least[None]])
                self.counts = torch.cat([self.counts, self.counts.new_ones(1)])
            else:
                self.changes = torch.cat([self.changes[:-1], change[None]])
                self.least = torch.cat([self.least[:-1], torch.minimum(self.least[-1:], least[None])])
                self.counts = torch.cat([self.counts[:-1], self.counts[-1:] + 1])
            if self._is_full():
                self._merge()

    def after(self, values: Tensor, kept: float) -> Tensor:
        r"""Return :math:`D` after an edit that leaves ``values`` in the trained entries.

        Args:
            values: Of the trained entries, in order.
            kept: :math:`\kappa`, what weight decay has left of :math:`W'`, so that the other entries of :math:`D` are
                :math:`\kappa D + (\kappa - 1) W`.
        """
        change = kept * self.current() + (kept - 1) * self.weight
        return change.masked_scatter(self.trained(), values.to(change))

    def _merge(self) -> None:
        full = [i for i, count in enumerate(self.counts.tolist()) if count == self.sharding.shard]
        if len(full) < self.sharding.merged:
            return
        rest = [i for i in range(len(self.counts)) if i not in full]
        merged, index = ties(self.changes[full], self.sharding.density), torch.tensor(full, device=self.device)
        self.changes = torch.cat([self.changes[rest], merged[None]])
        self.least = torch.cat([self.least[rest], self.least[index].min()[None]])
        self.counts = torch.cat([self.counts[rest], self.counts[index].sum()[None]])

    def contents(self) -> dict[str, Tensor]:
        """Return the memories."""
        return {"changes": self.changes, "least": self.least, "counts": self.counts}

    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace the memories."""
        self.changes, self.least, self.counts = (contents[name] for name in ("changes", "least", "counts"))

    def __len__(self) -> int:
        return int(self.counts.sum())

    def merged(self) -> dict[str, Tensor]:
        r"""Return the change :math:`W' - W` of the one copy, or of several merged by :func:`ties`."""
        if not len(self):
            return {}
        change = self.changes[0] if len(self.changes) == 1 else ties(self.changes, self.sharding.density)
        return {f"{self.name}.weight": change}

    # -- a prompt -------------------------------------------------------------------------------------------------
    @property
    def witness(self) -> nn.Module:
        """The module itself."""
        return self.host

    def decide(self, inputs: Tensor, outputs: Tensor, reading: Reading) -> Tensor:
        """Return the memory that answers each prompt, -1 for none."""
        return self.chosen(inputs.to(self.changes), outputs.to(self.changes), reading.prompt())

    def hooks(self) -> Iterator[Any]:
        """Replace the module's output."""
        yield from super().hooks()
        yield self.host.register_forward_hook(self._answer)

    def _answer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        reading = self.language_model.reader.reading
        assert reading is not None
        inputs, whole = apart(args[0], reading.rows).to(self.changes), apart(output, reading.rows).to(self.changes)
        assert self.held is not None
        added = torch.zeros_like(whole)
        for number, change in enumerate(self.changes):
            rows = (self.held == number)[:, None, None]
            added = torch.where(rows, inputs @ change.T, added)
        return output + added.to(output).view(output.shape)

    def chosen(self, inputs: Tensor, output: Tensor, prompt: Tensor) -> Tensor:
        """Return the memory that answers each prompt, -1 for none, shape ``(rows,)``.

        Args:
            inputs: Of the module, shape ``(rows, length, in_features)``.
            output: Of the module, shape ``(rows, length, out_features)``.
            prompt: Which tokens are the prompt, shape ``(rows, length)``.
        """
        found: Sequence[Tensor] = [
            mean_where(distances(self.activation, output, inputs @ change.T), prompt) for change in self.changes
        ]
        mean = torch.stack(list(found), dim=1)
        mean = mean.masked_fill(mean < (self.sharding.ratio * self.least).to(mean), -1)
        return mean.argmax(1).masked_fill((mean < 0).all(1), -1)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of each row's values at some places."""
    return (values * where).sum(1) / where.sum(1)
