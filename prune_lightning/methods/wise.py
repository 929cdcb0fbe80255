"""WISE: a trained copy of one weight matrix, and a choice between it and the original (Wang et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.module_memory import ModuleMemoryEditor, PrefixedMemoryEditor
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.methods.side_weights import Sharding, SideWeights, distances, mean_where
from prune_lightning.methods.tuning_problem import logits_of_output
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, NonNegative, Positive, Share, Whole
from prune_lightning.types import EditRequest, MemoryUpdate
from prune_lightning.value_types import check_values

_STILL = 1e-4  # a loss that has changed by no more does not move, as published


@dataclass(frozen=True)
class Margins:
    r"""Margins of the distances between the outputs of both matrices, in scope and out of scope.

    .. math:: [d_o - \alpha]_+ + [\beta - d_i]_+ + [\gamma + d_o - d_i]_+

    each the mean over the prompts where it is not zero.

    Args:
        alpha: Largest distance :math:`d_o` of an unrelated text.
        beta: Smallest distance :math:`d_i` of the edited prompts.
        gamma: Smallest difference of the two.
    """

    alpha: NonNegative = 5.0
    beta: NonNegative = 20.0
    gamma: NonNegative = 10.0

    def loss(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Return the sum of the three.

        Args:
            inside: Distance of each row of the edit, shape ``(n,)``.
            outside: Distance of the unrelated text, shape ``(1,)``.
        """
        parts = (self.gamma + outside - inside, outside - self.alpha, self.beta - inside)
        return torch.stack([part.clamp_min(0).sum() / (part > 0).sum().clamp_min(1) for part in parts]).sum()


class WISE(ModuleMemoryEditor, PrefixedMemoryEditor):
    r"""Train a copy of one weight matrix, and answer with it the prompts on which both matrices differ enough.

    An edit trains a random part of the copy by gradient descent on the cross-entropy of the target after every prefix,
    and on :class:`Margins` that make the outputs differ on the edit and agree on an unrelated sentence. The smallest
    distance of an edit is the threshold. :class:`~.side_weights.SideWeights` has shards, their merging, and the choice,
    which is made for every prompt by itself; the public code makes one for a whole batch.

    Args:
        language_model: The model to edit.
        layers: The block, one only.
        module: Name of the linear module in that block, e.g. ``c_fc``; ``None`` for the MLP's down-projection.
        margins: See :class:`Margins`.
        ratio: Share of the smallest distance of an edit from which on a prompt is answered by the copy.
        share: Share of the entries that a shard of edits trains.
        shard: Edits of a shard.
        merged: Shards that are merged into one.
        density: Share of the entries that the merging keeps.
        steps: Most steps.
        learning_rate: Learning rate.
        weight_decay: Of the whole copy in every step. The public code has 1e-5, which wears the model itself off.
        bound: Largest change of an entry.
        stop_loss: A loss of at most this that no longer moves ends the training.
        contexts: Which prefixes to sample.
        seed: Seed of the parts that are trained.
        fast: Run only the block and those above. The plain path computes the same from the whole model.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: Not one layer, no such module, or an option out of range.
    """

    mergeable: ClassVar[bool] = True
    low_rank: ClassVar[bool] = False  # a merged copy

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        module: str | None = None,
        margins: Margins | None = None,
        ratio: NonNegative = 0.88,
        share: Share = 0.2,
        shard: Count = 500,
        merged: Count = 2,
        density: Share = 0.53,
        steps: Count = 70,
        learning_rate: Positive = 1.0,
        weight_decay: NonNegative = 0.0,
        bound: Positive = 1.0,
        stop_loss: NonNegative = 0.02,
        contexts: ContextOptions | None = None,
        seed: int = 0,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, module, contexts=contexts, **kwargs)
        check_values("method", Count, shard=shard, merged=merged, steps=steps)
        check_values("method", Share, share=share, density=density)
        check_values("method", Positive, learning_rate=learning_rate, bound=bound)
        self.margins = margins or Margins()
        self.sharding = Sharding(ratio, share, shard, merged, density, seed)
        self.steps, self.learning_rate, self.weight_decay = steps, learning_rate, weight_decay
        self.bound, self.stop_loss, self.fast = bound, stop_loss, fast

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        module: str | None = None,
        share: float = 0.2,
        shard: int = 500,
        steps: int = 70,
        contexts: ContextOptions | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs: a matrix per shard, dense gradients, and passes through the upper blocks."""
        (outputs, inputs), prefixes = cls.shape(model, layers, module), cls.num_prefixes(contexts)
        size = float(outputs * inputs * max(model.weight_size, 4))
        found = training_cost(
            model,
            replace(stream, batch=prefixes),
            layers=layers,
            matrices=[],
            rank=0.0,
            trained=size,
            steps=steps,
            batch_size=prefixes,
            at_output=module is None,
        )
        held = {"side memories": size * -(-stream.edits // shard)}
        work = {name: each * prefixes for name, each in found.per_edit.items()}
        disk = {"entries": size * share * stream.edits}
        return replace(found, memory={**found.memory, **held}, per_edit=work, disk=disk)

    def new_memory(self) -> SideWeights:
        """Return an empty memory."""
        activation = self.language_model.activation(self.layers[0])
        return SideWeights(self.path, self.language_model, activation, self.sharding)

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MemoryUpdate], list[dict[str, Any]]]:
        """Return what each request leaves of the copy, one after another."""
        memory = self.side
        assert isinstance(memory, SideWeights)
        tensors: dict[str, Tensor] = {}
        rows, norms, details = [], [], []
        with memory.provisional(), memory.unedited():
            for i, request in enumerate(requests):
                before = memory.current()
                change, kept, least, losses = self._trained(memory, request, self.run.num_requests + i)
                entry = {"values.0": change[memory.trained()], "kept": kept[None], "least": least[None]}
                tensors[f"values.{i}"] = entry["values.0"]
                memory.include(entry)
                rows.append((kept, least))
                norms.append((change - before).norm())
                details.append({"steps": len(losses), "losses": losses, "distance": float(least)})
        tensors |= {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(("kept", "least"))}
        return {memory.name: MemoryUpdate(tensors, float(torch.stack(norms).norm()))}, details

    # -- one edit -------------------------------------------------------------------------------------------------
    def _unrelated(self, number: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask of a sentence that no edit concerns."""
        sentences, tokens = general_sentences(), self.language_model.tokens
        return tokens.pad([tokens.encode(sentences[number % len(sentences)])[: tokens.max_length]], self.device)

    def _averaged(self, mask: Tensor) -> Tensor:
        """Return the tokens over which a distance is averaged; the public code takes padding along."""
        return mask.bool()

    @torch.no_grad()
    def _seen(self, memory: SideWeights, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with capture([memory.host], [memory.host], rows=len(ids)) as seen:
            self.language_model(ids, mask)
        return seen.inputs[0].to(memory.weight), seen.outputs[0].to(memory.weight)

    def _trained(
        self, memory: SideWeights, request: EditRequest, number: int
    ) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """Return the change of the copy, what weight decay has left of it, the edit's distance, and the losses."""
        batch, (ids, mask) = self.target_batch(request), self._unrelated(number)
        edit, other = self._seen(memory, batch.ids, batch.mask), self._seen(memory, ids, mask)
        change, trained, weight = memory.current().clone().requires_grad_(), memory.trained(), memory.weight
        forward = logits_of_output(
            self.language_model, memory.host, self.layers[0], batch, "WISE's side memory", self.fast
        )
        left, kept, losses = 1 - self.learning_rate * self.weight_decay, 1.0, []
        least = change.new_zeros((), dtype=torch.float64)

        for _ in range(self.steps):

            def answered(output: Tensor, change: Tensor = change) -> Tensor:
                return output + (edit[0] @ change.T).to(output).view(output.shape)

            with torch.enable_grad():
                inside = self._distances(memory, edit, change, batch.mask)
                outside = self._distances(memory, other, change, mask)
                loss = batch.losses(forward(answered)).mean() + self.margins.loss(inside, outside)
            losses.append(float(loss.detach()))
            least = inside.detach().double().mean()
            (gradient,) = torch.autograd.grad(loss, change)
            with torch.no_grad():
                moved = left * change + (left - 1) * weight - self.learning_rate * gradient * trained
                change = moved.clamp(-self.bound, self.bound).requires_grad_()
            kept *= left
            if len(losses) > 1 and abs(losses[-2] - losses[-1]) <= _STILL and losses[-1] <= self.stop_loss:
                break
        return change.detach(), torch.tensor(kept, dtype=torch.float64, device=least.device), least, losses

    def _distances(self, memory: SideWeights, seen: tuple[Tensor, Tensor], change: Tensor, mask: Tensor) -> Tensor:
        inputs, output = seen
        return mean_where(distances(memory.activation, output, inputs @ change.T), self._averaged(mask))
