"""ELDER's memory: low-rank experts in several linear modules, their routers, and the codes of the edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prune_lightning.methods.deciding_memory import DecidingMemory
from prune_lightning.methods.expert_codes import chosen, hamming
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import apart, capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.types import LowRankUpdate


@dataclass(frozen=True)
class Experts:
    r""":math:`N` low-rank experts and a router in each of :math:`L` modules.

    Args:
        down: :math:`A`, shape ``(L, N * rank, in_features)``.
        up: :math:`B`, shape ``(L, out_features, N * rank)``.
        routers: :math:`W_r`, shape ``(L, N, in_features)``. There is no bias, as in the paper; the public code has
            one.
        scale: :math:`\alpha / r`.
    """

    down: Tensor
    up: Tensor
    routers: Tensor
    scale: float

    @classmethod
    def initial(cls, layers: int, shape: tuple[int, int], experts: int, rank: int, alpha: float, seed: int) -> Experts:
        r"""Return untrained ones on the CPU in fp32, alike on every device: :math:`B = 0`, the rest as in ``Linear``.

        Args:
            layers: :math:`L`.
            shape: ``(out_features, in_features)`` of the modules.
            experts: :math:`N`.
            rank: Of an expert.
            alpha: :math:`\alpha`.
            seed: Of the draws.
        """
        generator, (outputs, inputs) = torch.Generator().manual_seed(seed), shape

        def drawn(*size: int) -> Tensor:
            return (2 * torch.rand(layers, *size, generator=generator) - 1) / math.sqrt(inputs)

        down, routers = drawn(experts * rank, inputs), drawn(experts, inputs)
        return cls(down, torch.zeros(layers, outputs, experts * rank), routers, alpha / rank)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained, by name."""
        return {"down": self.down, "up": self.up, "routers": self.routers}

    def changed(self, tensors: Mapping[str, Tensor]) -> Experts:
        """Return experts with other tensors."""
        return Experts(tensors["down"], tensors["up"], tensors["routers"], self.scale)

    @property
    def rank(self) -> int:
        """Rank of an expert."""
        return self.down.shape[1] // self.routers.shape[1]

    def log_scores(self, queries: Tensor) -> Tensor:
        r"""Return :math:`\log \mathrm{softmax}(W_r q)` of every layer, shape ``(rows, L, N)``."""
        return torch.einsum("ri,lni->rln", queries.to(self.routers), self.routers).log_softmax(-1)

    def added(self, layer: int, inputs: Tensor, gates: Tensor) -> Tensor:
        r"""Return :math:`\sum_i g_i \frac{\alpha}{r} B_i A_i v` of a layer at every token.

        Args:
            layer: Number of the layer among the adapted ones.
            inputs: :math:`v`, shape ``(rows, length, in_features)``.
            gates: :math:`g`, shape ``(rows, N)``: zero for experts that do not answer.
        """
        blocks = (self.scale * gates).repeat_interleave(self.rank, dim=1)[:, None]
        return (inputs.to(self.down) @ self.down[layer].T * blocks) @ self.up[layer].T

    def distance(self, other: Experts) -> float:
        r"""Return the Frobenius norm of the difference of all :math:`\frac{\alpha}{r} B_i A_i`."""
        squares = 0.0
        for layer in range(len(self.down)):
            ups = self.up[layer].split(self.rank, 1), other.up[layer].split(self.rank, 1)
            downs = self.down[layer].split(self.rank), other.down[layer].split(self.rank)
            for up, up0, down, down0 in zip(*ups, *downs, strict=True):
                difference = LowRankUpdate(torch.cat([up, -up0], 1), torch.cat([down, down0]).T)
                squares += (self.scale * difference.norm()) ** 2
        return math.sqrt(squares)


@dataclass(frozen=True)
class Routing:
    """Which experts answer a prompt, if any.

    Args:
        active: Experts of a layer that answer.
        epsilon: A prompt is answered by experts if its code is closer than this to that of an edit.
        center: The mean query of general text is taken off.
        reencode: Codes of the edits are those that the routers give their prompts now, not those at the end of their
            own training.
    """

    active: int
    epsilon: float
    center: bool
    reencode: bool


class ExpertMemory(DecidingMemory):
    r"""Experts in linear modules of several blocks, of which each prompt uses a few.

    The query :math:`q` of a prompt is the input at its last token of the linear module of the same kind in the block
    below. It does not depend on the experts. In every layer the ``active`` experts with the largest scores
    :math:`s = \mathrm{softmax}(W_r q)` form the prompt's code. If it is close enough to that of an edit,

    .. math:: y = W v + b + \sum_{i \in S} s_i \frac{\alpha}{r} B_i A_i v

    at all tokens, and the module as it is otherwise. Scores are not normalised again.

    Args:
        paths: Paths of the adapted modules, from the lowest up.
        below: Path of the module whose input is the query.
        language_model: The model.
        experts: Returns the untrained experts of modules of a shape.
        routing: See :class:`Routing`.
    """

    inseparable = "ELDER trains all edits into the same experts, one on top of the other"

    def __init__(
        self,
        paths: Sequence[str],
        below: str,
        language_model: LanguageModel,
        experts: Callable[[tuple[int, int]], Experts],
        routing: Routing,
    ) -> None:
        self.hosts = [language_model.model.get_submodule(path) for path in paths]
        self.below, self.routing = language_model.model.get_submodule(below), routing
        self._initial = experts
        self._table: Tensor | None = None
        super().__init__("experts", language_model)
        self.mean = unrelated_queries(language_model, self.below).to(self.queries).mean(0) if routing.center else None

    # -- the state ------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget all edits."""
        weight = cast(Tensor, self.hosts[0].weight).detach()
        outputs, inputs = weight.T.shape if stores_transposed(self.hosts[0]) else weight.shape
        untrained, dtype = self._initial((outputs, inputs)), torch.promote_types(weight.dtype, torch.float32)
        self.experts = untrained.changed({name: t.to(weight.device, dtype) for name, t in untrained.tensors().items()})
        layers, experts, _ = self.experts.routers.shape
        self.queries = self.experts.down.new_zeros(0, inputs)
        self.codes = torch.zeros(0, layers, experts, dtype=torch.bool, device=weight.device)
        self.labels = torch.zeros(0, dtype=torch.long, device=weight.device)
        self.allocations = torch.zeros(0, layers, self.routing.active, dtype=torch.int16, device=weight.device)
        self._table = None

    def entries(self) -> dict[str, Tensor]:
        """Return what is kept of each edit."""
        kept = {"queries": self.queries, "codes": self.codes, "labels": self.labels, "allocations": self.allocations}
        return dict(kept)

    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the experts and add the edits of a step."""
        grown = {name: torch.cat([known, tensors[name].to(known)]) for name, known in self.entries().items()}
        self.load({**self.experts.tensors(), **tensors, **grown})

    def contents(self) -> dict[str, Tensor]:
        """Return experts and edits."""
        return {**self.experts.tensors(), **self.entries()}

    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace experts and edits."""
        self.experts = self.experts.changed(contents)
        self.queries, self.codes = contents["queries"], contents["codes"]
        self.labels, self.allocations = contents["labels"], contents["allocations"]
        self._table = None

    def to(self, device: torch.device) -> ExpertMemory:
        """Move the state to a device, in place."""
        super().to(device)
        self.mean = None if self.mean is None else self.mean.to(device)
        return self

    def __len__(self) -> int:
        return len(self.queries)

    # -- a prompt -------------------------------------------------------------------------------------------------
    def read(self, inputs: Tensor, ends: Tensor) -> Tensor:
        """Return the queries of prompts, shape ``(rows, in_features)``.

        Args:
            inputs: Of the module below, shape ``(rows, length, in_features)``.
            ends: Position of each prompt's last token, shape ``(rows,)``.
        """
        found = inputs[torch.arange(len(ends), device=ends.device), ends].to(self.queries)
        return found if self.mean is None else found - self.mean

    def code(self, log_scores: Tensor) -> Tensor:
        """Return which experts have the largest scores, shape ``(rows, layers, experts)``."""
        return chosen(log_scores.topk(self.routing.active).indices, log_scores.shape[-1])

    @property
    def table(self) -> Tensor:
        """The codes of the edits, shape ``(edits, layers, experts)``."""
        if self._table is None:
            self._table = self.present() if self.routing.reencode else self.codes
        return self._table

    def present(self) -> Tensor:
        """Return the codes that the routers now give the prompts of the edits."""
        return self.code(self.experts.log_scores(self.queries))

    def distances(self, codes: Tensor) -> Tensor:
        """Return the Hamming distance of codes to the closest code of an edit, shape ``(rows,)``."""
        return hamming(codes, self.table).amin(1)

    def gates(self, queries: Tensor) -> Tensor:
        """Return the scores of the experts that answer prompts, shape ``(rows, layers, experts)``, else zero."""
        log_scores = self.experts.log_scores(queries)
        code = self.code(log_scores)
        answered = self.distances(code) < self.routing.epsilon
        return log_scores.exp() * (code & answered[:, None, None])

    @property
    def witness(self) -> nn.Module:
        """The module below."""
        return self.below

    def decide(self, inputs: Tensor, outputs: Tensor, reading: Reading) -> Tensor:
        """Return the scores of the experts that answer each prompt, see :meth:`gates`."""
        assert reading.ends is not None
        return self.gates(self.read(inputs, reading.ends))

    def answered(self, held: Tensor) -> Tensor:
        """Return which prompts any expert answers."""
        return held.flatten(1).any(1)

    def hooks(self) -> Iterator[Any]:
        """Decide at the module below, and add to the outputs of the others."""
        yield from super().hooks()
        for layer, host in enumerate(self.hosts):
            yield host.register_forward_hook(partial(self._add, layer))

    def _add(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        reading = self.language_model.reader.reading
        assert reading is not None
        assert self.held is not None
        if not self.held.any():
            return None
        added = self.experts.added(layer, apart(args[0], reading.rows), self.held[:, layer])
        return output + added.to(output).view(output.shape)


@torch.no_grad()
def unrelated_queries(language_model: LanguageModel, below: nn.Module) -> Tensor:
    """Return the inputs of a module at the ends of unrelated prompts, shape ``(n, in_features)``.

    The prompts are sentences of the general text that is shipped, without their last word.
    """
    found = []
    with language_model.frozen_mode():
        for sentence in general_sentences():
            tokens = language_model.tokens.encode(sentence.rpartition(" ")[0])[: language_model.tokens.max_length]
            ids, mask = language_model.tokens.pad([tokens], language_model.device)
            with capture([below], rows=1) as seen:
                language_model(ids, mask)
            found.append(seen.inputs[0][0, -1])
    return torch.stack(found)
