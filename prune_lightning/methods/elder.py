"""ELDER: a mixture of low-rank experts with a router that is trained to tell edits apart (Li et al., AAAI 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError, one_of
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.expert_codes import allocate, chosen, experts_for, hamming, label
from prune_lightning.methods.expert_distances import distance_facts
from prune_lightning.methods.expert_memory import ExpertMemory, Experts, Routing
from prune_lightning.methods.module_memory import PrefixedMemoryEditor, module_path, module_shape
from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.methods.tuning_problem import logits_above
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import add_branch, apart, capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, NonNegative, Positive, Whole
from prune_lightning.types import EditRequest, MemoryUpdate
from prune_lightning.value_types import check_values

ALLOCATIONS = ("fact", "target")
ROUTES = ("soft", "hard")


class ELDER(PrefixedMemoryEditor):
    r"""Train low-rank experts in several layers, and routers that send every fact to experts of its own.

    See :class:`~.expert_memory.ExpertMemory` for the experts and for when they answer a prompt. Each fact gets random
    experts :math:`\mathcal A`, different from those of other facts. Its rows, the prompt after every prefix, train
    experts and routers of all layers :math:`\ell` on

    .. math:: \mathcal L = \mathcal L_{\mathrm{LM}} + \lambda \sum_{(\ell, j) \in \mathcal A} -\log s^\ell_j

    the mean over the rows. The forward pass takes the router's own choice. The paper trains rephrased prompts along;
    here prefixes take their place, since paraphrases are the test.

    Later edits move the routers, and so the codes of earlier ones. The queries of the edits are kept, which no edit
    changes, and their codes are computed again.

    Args:
        language_model: The model to edit.
        layers: Blocks with experts. The query is read in the block below the first.
        module: Name of the linear module in these blocks, e.g. ``c_fc``; ``None`` for the MLP's down-projection.
        experts: Experts of a layer, :math:`N`; ``None`` for as few as have the published number of codes, 4 to 16.
        active: How many of them answer a prompt, :math:`k`.
        rank: Rank of an expert.
        alpha: :math:`\alpha`; an expert is :math:`\frac{\alpha}{r} B A`.
        guidance: :math:`\lambda`.
        epsilon: Experts answer prompts whose code has a smaller Hamming distance to that of an edit; ``None`` for half
            of the largest distance, :math:`L k`, which is the published 12 with its six layers.
        allocation: ``fact`` if every prompt is a fact of its own, ``target`` if those with the same target share
            experts.
        route: ``soft`` or, to train with the experts of :math:`\mathcal A` instead of the router's choice, ``hard``.
        center: Take the mean query of general text off each query. The paper does not. In small models queries share
            most of their length, and without this all of them move together.
        reencode: Compute the codes of earlier edits again; otherwise they stay as at the end of their training, as
            published.
        steps: Steps of Adam for a batch.
        learning_rate: Its learning rate.
        batch_size: Facts that are trained together.
        contexts: Which prefixes to sample.
        seed: Seed of the untrained experts and of the allocations.
        fast: Run only the blocks with experts, and those above. The plain path computes the same from the whole model.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: No block below the first one, no such module, or an option out of range.
    """

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        module: str | None = None,
        experts: Count | None = None,
        active: Count = 2,
        rank: Count = 8,
        alpha: Positive = 8.0,
        guidance: NonNegative = 1e-2,
        epsilon: NonNegative | None = None,
        allocation: str = "fact",
        route: str = "soft",
        center: bool = False,
        reencode: bool = True,
        steps: Count = 50,
        learning_rate: Positive = 1e-4,
        batch_size: Count = 4,
        contexts: ContextOptions | None = None,
        seed: int = 0,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, contexts, **kwargs)
        check_values("method", Count, active=active, rank=rank, steps=steps, batch_size=batch_size)
        check_values("method", Positive, alpha=alpha, learning_rate=learning_rate)
        check_values("method", NonNegative, guidance=guidance)
        one_of("method.allocation", allocation, ALLOCATIONS)
        one_of("method.route", route, ROUTES)
        if not self.layers[0]:
            raise UserError("ELDER reads the block below the first of `layers`: it has to be 1 or later")
        self.number = experts_for(len(self.layers), active) if experts is None else experts
        if self.number <= active:
            raise UserError(
                f"method.active={active} experts of a layer answer, and there are {self.number}: all prompts would "
                "have the same code; method.experts has to be larger"
            )
        paths = [module_path(language_model, layer, module) for layer in (self.layers[0] - 1, *self.layers)]
        self.below, self.paths = paths[0], paths[1:]
        half = float(len(self.layers) * min(active, self.number - active))
        self.routing = Routing(active, half if epsilon is None else epsilon, center, reencode)
        self.rank, self.alpha, self.guidance = rank, alpha, guidance
        self.allocation, self.route = allocation, route
        self.steps, self.learning_rate, self.batch_size = steps, learning_rate, batch_size
        self.seed, self.fast = seed, fast

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        module: str | None = None,
        experts: int | None = None,
        active: int = 2,
        rank: int = 8,
        steps: int = 50,
        batch_size: int = 4,
        contexts: ContextOptions | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs: the experts, a query per edit, and passes through the upper blocks for every prefix."""
        (outputs, inputs), prefixes = module_shape(model, layers[0], module), cls.num_prefixes(contexts)
        number, entry = experts or experts_for(len(layers), active), max(model.weight_size, 4)
        size = float(len(layers) * number * (rank * (outputs + inputs) + inputs) * entry)
        rows = min(stream.batch, batch_size) * prefixes
        found = training_cost(
            model,
            replace(stream, batch=rows),
            layers=layers,
            matrices=[],
            rank=0.0,
            trained=size,
            steps=steps,
            batch_size=rows,
        )
        work = {name: each * prefixes for name, each in found.per_edit.items()}
        queries = float(inputs * entry * stream.edits)
        disk = {"entries": size * -(-stream.edits // stream.batch) + queries}
        return replace(found, memory={"experts": size, "queries": queries}, per_edit=work, disk=disk)

    def new_memory(self) -> ExpertMemory:
        """Return an empty memory."""

        def untrained(shape: tuple[int, int]) -> Experts:
            return Experts.initial(len(self.layers), shape, self.number, self.rank, self.alpha, self.seed)

        return ExpertMemory(self.paths, self.below, self.language_model, untrained, self.routing)

    # -- an edit --------------------------------------------------------------------------------------------------
    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MemoryUpdate], list[dict[str, Any]]]:
        """Return the experts after these requests, and the entries of the requests."""
        memory = self.side
        assert isinstance(memory, ExpertMemory)
        before, known, details = memory.experts, len(memory), []
        with memory.provisional(), memory.unedited():
            for start in range(0, len(requests), self.batch_size):
                group = requests[start : start + self.batch_size]
                tensors, found = self._trained(memory, group)
                memory.include(tensors)
                details += found
            after = memory.experts
            entries = {name: tensor[known:] for name, tensor in memory.entries().items()}
        return {memory.name: MemoryUpdate({**after.tensors(), **entries}, after.distance(before))}, details

    def _trained(
        self, memory: ExpertMemory, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Return the experts after training some requests together, the entries, and the details."""
        batch = self.target_batch(*requests)
        queries, labels = self._queries(memory, batch), [self._label(request) for request in requests]
        shape = (len(self.layers), self.number, self.routing.active)
        allocations = allocate(labels, memory.labels, memory.allocations, shape, self.seed)
        meant = chosen(allocations, self.number).to(memory.device).repeat_interleave(len(self.prefixes), 0)
        experts, losses = self._train(memory, batch, queries, meant)
        codes = memory.code(experts.log_scores(queries)).view(len(requests), len(self.prefixes), *meant.shape[1:])
        entries = {
            "queries": queries.view(len(requests), len(self.prefixes), -1)[:, 0].to(experts.down),
            "codes": codes[:, 0],
            "labels": torch.tensor(labels, device=memory.device),
            "allocations": allocations.to(memory.device),
        }
        meant = meant.view(codes.shape)
        details = [
            {
                "steps": self.steps,
                "losses": losses[:, i].tolist(),
                "allocated": float((codes[i] & meant[i]).sum() / meant[i].sum()),
                "distance": int(hamming(codes[i], codes[i, :1]).max()),
            }
            for i in range(len(requests))
        ]
        return {**experts.tensors(), **entries}, details

    def _label(self, request: EditRequest) -> int:
        return label(request.prompt if self.allocation == "fact" else request.target_new)

    @torch.no_grad()
    def _queries(self, memory: ExpertMemory, batch: TargetBatch) -> Tensor:
        """Return the query of each row, shape ``(rows, in_features)``; the first label is read at the prompt's end."""
        rows = len(batch.ids)
        ends = batch.positions.new_full((rows,), batch.ids.shape[1]).scatter_reduce(
            0, batch.rows, batch.positions, "amin"
        )
        with capture([memory.below], rows=rows) as seen:
            self.language_model(batch.ids, batch.mask)
        return memory.read(seen.inputs[0], ends)

    def _train(
        self, memory: ExpertMemory, batch: TargetBatch, queries: Tensor, meant: Tensor
    ) -> tuple[Experts, Tensor]:
        """Return the trained experts, and the loss of each request before each step, ``(steps, requests)``."""
        parameters = {name: t.clone().requires_grad_() for name, t in memory.experts.tensors().items()}
        experts, history = memory.experts.changed(parameters), []
        forward = logits_above(self.language_model, self.layers[0], batch, "ELDER's experts", self.fast)
        optimizer = torch.optim.Adam(parameters.values(), lr=self.learning_rate)
        for _ in range(self.steps):
            with torch.enable_grad():
                losses = self.losses(memory, experts, batch, forward, queries, meant)
                optimizer.zero_grad()
                losses.mean().backward()
            optimizer.step()
            history.append(losses.detach().view(-1, len(self.prefixes)).mean(1))
        return experts.changed({name: t.detach() for name, t in parameters.items()}), torch.stack(history)

    def losses(
        self,
        memory: ExpertMemory,
        experts: Experts,
        batch: TargetBatch,
        forward: Callable[[], Tensor],
        queries: Tensor,
        meant: Tensor,
    ) -> Tensor:
        r"""Return the loss of each row, shape ``(rows,)``.

        Args:
            memory: Where the experts are.
            experts: The experts, with gradients.
            batch: The rows.
            forward: Computes their logits.
            queries: Their queries, shape ``(rows, in_features)``.
            meant: :math:`\mathcal A` of each, shape ``(rows, layers, experts)``.
        """
        log_scores = experts.log_scores(queries)
        gates = log_scores.exp() * (meant if self.route == "hard" else memory.code(log_scores.detach()))

        def branch(inputs: Tensor, layer: int) -> Tensor:
            added = experts.added(layer, apart(inputs, len(queries)), gates[:, layer])
            return added.to(inputs).view(*inputs.shape[:-1], -1)

        with ExitStack() as stack:
            for layer, host in enumerate(memory.hosts):
                stack.enter_context(add_branch(host, partial(branch, layer=layer)))
            losses = batch.losses(forward())
        return losses - self.guidance * (log_scores * meant).sum((1, 2))

    # -- what epsilon is chosen by --------------------------------------------------------------------------------
    def summary(self) -> dict[str, Any]:
        """Return the number of edits, and how far codes are from those of the edits."""
        found, memory = super().summary(), self.side
        assert isinstance(memory, ExpertMemory)
        if not len(memory):
            return found
        return {**found, "method_facts": {**found["method_facts"], **distance_facts(memory)}}
