"""MEMOIR: a residual memory, of which each edit and each prompt use a few columns (Wang et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.module_memory import ModuleMemoryEditor, PrefixedMemoryEditor
from prune_lightning.methods.residual_training import Trained, marked, train_columns
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.methods.side_memory import SideMemory
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import apart, capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.ranges import Count, NonNegative, Positive, Share, Whole
from prune_lightning.types import EditRequest, LowRankUpdate, MemoryUpdate
from prune_lightning.value_types import check_values

SENTENCES = 100  # of general text, whose mean input is taken off


class ResidualMemory(SideMemory):
    r"""A matrix :math:`M` beside a down-projection, :math:`y = W x + M (x \circ m)`.

    The mask :math:`m` of a prompt has the ``count`` inputs that are largest, in magnitude, in the mean over its tokens
    less the mean over general text, shuffled by a fixed permutation. A prompt gets the mask of the edit with which it
    shares most, if that is at least ``threshold`` of the mask; otherwise :math:`M` is not used.

    Args:
        name: Path of the down-projection.
        language_model: The model, unedited.
        count: Inputs in a mask.
        threshold: Least share of a mask.
        seed: Seed of the permutation.
    """

    def __init__(self, name: str, language_model: LanguageModel, count: int, threshold: float, seed: int) -> None:
        self.host = language_model.model.get_submodule(name)
        self.count, self.threshold = count, threshold
        weight = cast(Tensor, self.host.weight)
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        super().__init__(name, language_model)
        self.background = self._mean_input().to(self._dtype)
        order = torch.randperm(len(self.background), generator=torch.Generator().manual_seed(seed))
        self.permutation = order.to(self.background.device)

    @torch.no_grad()
    def _mean_input(self) -> Tensor:
        model, means = self.language_model, []
        with model.frozen_mode():
            for text in general_sentences()[:SENTENCES]:
                ids, mask = model.tokens.pad([model.tokens.encode(text)[: model.tokens.max_length]], model.device)
                with capture(inputs=[self.host], rows=1) as seen:
                    model(ids, mask)
                means.append(seen.inputs[0][0].to(self._dtype))
        return torch.cat(means).mean(0)

    # -- the state ------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget everything."""
        weight = cast(Tensor, self.host.weight)
        outputs, inputs = weight.T.shape if stores_transposed(self.host) else weight.shape
        self.matrix = torch.zeros(outputs, inputs, dtype=self._dtype, device=weight.device)
        self.masks = torch.zeros(0, inputs, dtype=torch.bool, device=weight.device)

    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the columns of a step's edits, one after another."""
        for i, columns in enumerate(tensors["masks"]):
            part = {name: tensors[f"{name}.{i}"] for name in ("left", "right") if f"{name}.{i}" in tensors}
            self.matrix = with_columns(self.matrix, columns, part, float(tensors["kept"][i]))
        self.masks = torch.cat([self.masks, marked(tensors["masks"], self.matrix.shape[1])])

    def contents(self) -> dict[str, Tensor]:
        """Return the matrix and the masks."""
        return {"matrix": self.matrix, "masks": self.masks}

    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace the matrix and the masks."""
        self.matrix, self.masks = contents["matrix"], contents["masks"]

    def to(self, device: torch.device) -> ResidualMemory:
        """Move the state to a device, in place."""
        super().to(device)
        self.background, self.permutation = self.background.to(device), self.permutation.to(device)
        return self

    def __len__(self) -> int:
        return len(self.masks)

    # -- a prompt -------------------------------------------------------------------------------------------------
    def columns(self, inputs: Tensor, prompt: Tensor) -> Tensor:
        """Return the columns in the mask of each prompt, ascending, shape ``(rows, count)``.

        Args:
            inputs: Of the down-projection, shape ``(rows, length, in_features)``.
            prompt: Which tokens are the prompt, shape ``(rows, length)``.
        """
        share = prompt.to(self._dtype) / prompt.sum(1, keepdim=True)
        feature = torch.einsum("rl,rli->ri", share, inputs.to(self._dtype)) - self.background
        return self.permutation[feature.abs().topk(self.count).indices].sort(1).values

    def closest(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the edit that shares most of each mask, and how much of it."""
        shared = marked(columns, self.matrix.shape[1]).float() @ self.masks.float().T
        found = shared.max(1)
        return found.indices, found.values / self.count

    def used(self, columns: Tensor) -> Tensor:
        """Return the columns that each prompt uses: those of the closest edit, or none if that shares too little."""
        entry, share = self.closest(columns)
        return self.masks[entry] & (share >= self.threshold)[:, None]

    def hooks(self) -> Iterator[Any]:
        """Add to the down-projection's output."""
        yield self.host.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        reading = self.language_model.reader.reading
        assert isinstance(reading, Reading)
        inputs = apart(args[0], reading.rows)
        if reading.ends is not None:
            self.held = self.used(self.columns(inputs, reading.prompt()))
        assert self.held is not None
        added = (inputs.to(self._dtype) * self.held[:, None]) @ self.matrix.T
        return output + added.to(output).view(output.shape)


def mask_size(width: int) -> int:
    """Return the number of inputs in a mask, of so many: the published share."""
    return max(1, round(width * 4096 / 14336))


def with_columns(matrix: Tensor, columns: Tensor, part: Mapping[str, Tensor], kept: float) -> Tensor:
    """Return a matrix times ``kept`` plus what an edit adds to some columns: ``left``, or ``left`` times ``right``.

    Products are added entry by entry and in order, so that a replay has the same bits.
    """
    changed, own = matrix * kept, columns.long()
    block = changed[:, own]
    if "right" in part:
        LowRankUpdate(part["left"], part["right"]).add_to(block)
    else:
        block = block + part["left"].to(block)
    changed[:, own] = block
    return changed


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
