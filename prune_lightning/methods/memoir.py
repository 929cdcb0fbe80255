"""MEMOIR: a residual memory, of which each edit and each prompt use a few columns (Wang et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.module_memory import ModuleMemoryEditor, PrefixedMemoryEditor
from prune_lightning.methods.residual_memory import ResidualMemory, with_columns
from prune_lightning.methods.residual_training import Trained, train_columns
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.ranges import Count, NonNegative, Positive, Share, Whole
from prune_lightning.types import EditRequest, MemoryUpdate
from prune_lightning.value_types import check_values


def mask_size(width: int) -> int:
    """Return the number of inputs in a mask, of so many: the published share."""
    return max(1, round(width * 4096 / 14336))


class MEMOIR(ModuleMemoryEditor, PrefixedMemoryEditor):
    r"""Train the columns of a residual memory that an edit's prompt selects, and nothing else.

    :math:`M` is trained by gradient descent on the cross-entropy of the target, after every prefix, with the input
    masked by the bare prompt's mask; see :class:`ResidualMemory` for the mask and for when :math:`M` is used. What it
    does to a prompt holds for the whole answer. Inputs do not change while :math:`M` is trained, so the change is a sum
    of outer products with the inputs, and no dense gradient is needed; see :func:`~.residual_training.train_columns`.

    Args:
        language_model: The model to edit.
        layers: The block, one only.
        count: Inputs in a mask; ``None`` for two sevenths of all, the published 4096 of 14336.
        threshold: Least share of a mask for :math:`M` to be used. It depends on the data.
        steps: Most steps of gradient descent.
        learning_rate: Its learning rate.
        clip: Largest norm of a gradient.
        weight_decay: Of the whole memory in every step. The public code has 1e-5, which wears earlier edits off.
        stop_loss: A loss of at most this that no longer moves ends the training.
        contexts: Which prefixes to sample.
        seed: Seed of the permutation.
        fast: Run only the block and those above. The plain path computes the same from the whole model.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: Not one layer, a mask of all inputs, or an option out of range.
    """

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        count: Count | None = None,
        threshold: Share = 0.4,
        steps: Count = 30,
        learning_rate: Positive = 1.0,
        clip: Positive = 1.0,
        weight_decay: NonNegative = 0.0,
        stop_loss: NonNegative = 0.02,
        contexts: ContextOptions | None = None,
        seed: int = 0,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, contexts=contexts, **kwargs)
        check_values("method", Count, steps=steps)
        check_values("method", Positive, learning_rate=learning_rate, clip=clip)
        check_values("method", Share, threshold=threshold)
        width = language_model.key_size(self.layers[0])
        self.count = mask_size(width) if count is None else count
        if not 0 < self.count < width:
            raise UserError(
                f"method.count={self.count} is not between 1 and {width - 1}: the module has {width} inputs"
            )
        if threshold <= (chance := self.count / width):
            raise UserError(
                f"method.threshold={threshold:g} is not above {chance:.2g}, which two random masks of {self.count} of "
                f"{width} inputs share: the memory would answer every prompt"
            )
        self.threshold, self.steps, self.learning_rate, self.clip = threshold, steps, learning_rate, clip
        self.weight_decay, self.stop_loss, self.seed, self.fast = weight_decay, stop_loss, seed, fast

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        count: int | None = None,
        steps: int = 30,
        contexts: ContextOptions | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs: the matrix, a mask per edit, and passes through the upper blocks for every prefix."""
        (outputs, inputs), prefixes = cls.shape(model, layers, None), cls.num_prefixes(contexts)
        entry = max(model.weight_size, 4)
        found = training_cost(
            model,
            replace(stream, batch=prefixes),
            layers=layers,
            matrices=[],
            rank=0.0,
            trained=float(outputs * stream.prompt * prefixes * 4),
            steps=steps,
            batch_size=prefixes,
            at_output=True,
        )
        held = {"residual memory": float(outputs * inputs * entry), "masks": float(inputs * stream.edits)}
        work = {name: each * prefixes for name, each in found.per_edit.items()}
        disk = {"entries": float(outputs * (count or mask_size(inputs)) * entry * stream.edits)}
        return replace(found, memory={**found.memory, **held}, per_edit=work, disk=disk)

    def new_memory(self) -> ResidualMemory:
        """Return an empty memory."""
        return ResidualMemory(self.path, self.language_model, self.count, self.threshold, self.seed)

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MemoryUpdate], list[dict[str, Any]]]:
        """Return the trained columns of the requests, one after another."""
        memory = self.side
        assert isinstance(memory, ResidualMemory)
        tensors: dict[str, Tensor] = {}
        found: list[tuple[Tensor, Trained]] = []
        with memory.unedited():
            matrix = memory.matrix
            for i, request in enumerate(requests):
                columns, trained = self._trained(memory, matrix, request)
                part = trained.factors()
                tensors |= {f"{name}.{i}": tensor for name, tensor in part.items()}
                matrix = with_columns(matrix, columns, part, trained.kept)
                found.append((columns, trained))
        tensors["masks"] = torch.stack([columns for columns, _ in found]).int()
        tensors["kept"] = torch.tensor([each.kept for _, each in found], dtype=torch.float64, device=memory.device)
        strength = float(torch.tensor([trained.norm() for _, trained in found]).norm())
        details = [{"steps": len(trained.losses), "losses": trained.losses} for _, trained in found]
        return {memory.name: MemoryUpdate(tensors, strength)}, details

    def _trained(self, memory: ResidualMemory, matrix: Tensor, request: EditRequest) -> tuple[Tensor, Trained]:
        """Return the columns in the mask of a request, and what training on top of ``matrix`` adds to them."""
        model, batch = self.language_model, self.target_batch(request)
        (pair,) = model.tokens.encode_pairs([request.pair()])
        end = torch.tensor([pair.target_start - 1], device=model.device)
        with torch.no_grad(), capture([memory.host], rows=len(batch.ids)) as seen:
            model(batch.ids, batch.mask)
        inputs, real = seen.inputs[0], batch.mask.bool()
        (columns,) = memory.columns(inputs[:1], Reading(real[:1], end).prompt())
        trained = train_columns(
            model,
            memory.host,
            self.layers[0],
            batch,
            inputs[real][:, columns].to(matrix),
            matrix[:, columns],
            steps=self.steps,
            learning_rate=self.learning_rate,
            clip=self.clip,
            weight_decay=self.weight_decay,
            stop_loss=self.stop_loss,
            fast=self.fast,
        )
        return columns, trained
