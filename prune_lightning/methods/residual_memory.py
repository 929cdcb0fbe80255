"""MEMOIR's residual memory: a matrix beside a down-projection, of which each prompt uses a few columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from prune_lightning.methods.deciding_memory import DecidingMemory
from prune_lightning.methods.residual_training import marked
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import apart, capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.types import LowRankUpdate

SENTENCES = 100  # of general text, whose mean input is taken off


class ResidualMemory(DecidingMemory):
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

    @property
    def witness(self) -> nn.Module:
        """The down-projection."""
        return self.host

    def decide(self, inputs: Tensor, outputs: Tensor, reading: Reading) -> Tensor:
        """Return the columns that each prompt uses, by the mean of the inputs."""
        return self.used(self.columns(inputs, reading.prompt()))

    def answered(self, held: Tensor) -> Tensor:
        """Return which prompts use any column."""
        return held.any(1)

    def hooks(self) -> Iterator[Any]:
        """Add to the down-projection's output."""
        yield from super().hooks()
        yield self.host.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        reading = self.language_model.reader.reading
        assert isinstance(reading, Reading)
        inputs = apart(args[0], reading.rows)
        assert self.held is not None
        added = (inputs.to(self._dtype) * self.held[:, None]) @ self.matrix.T
        return output + added.to(output).view(output.shape)


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
