"""Arranges sequences for one forward pass and maps each token to its position in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.models.batching import TOKEN_BUDGET, by_length
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import PromptMemory
from prune_lightning.models.token_tree import ROW_LENGTH, TreeRow, grow, tree_inputs

PAYS = 0.9
"""Tokens are left out only if at most this share of them remains, since gathering them has a cost, too."""
WORTH = 0.5
"""The same under a memory: prompts that it answers are run twice."""


@dataclass(frozen=True)
class Packed:
    """``n`` sequences in one forward pass.

    Args:
        inputs: Keyword arguments of the model.
        row: Row of each token in the inputs, shape ``(n, longest)``; arbitrary after a sequence's end.
        place: Its position in the row, same shape.
    """

    inputs: dict[str, Tensor]
    row: Tensor
    place: Tensor

    def find(self, sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and positions of some tokens, to index an activation."""
        return self.row[sequences, positions], self.place[sequences, positions]


def shares_beginnings(model: LanguageModel) -> bool:
    """Whether equal tokens are computed alike in all sequences: no memory changes them in one and not in another."""
    return model.memory is None or model.memory.only_asks


def parts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], token_budget: int = TOKEN_BUDGET
) -> Iterator[tuple[list[int], AbstractContextManager[None]]]:
    """Divide prompts into those that a memory leaves alone, which can share their beginnings, and the others.

    Everything is one part, to be run with the memory, if sharing would not be worth the passes that the division takes.
    Everything is one part, too, if there is no memory.

    Args:
        model: The language model.
        prompts: Token ids.
        token_budget: Padded tokens per forward pass.

    Yields:
        Places in ``prompts``, and the context in which to run them.
    """
    memory, every = model.memory, list(range(len(prompts)))
    if memory is None or memory.only_asks or not _worth_dividing(model, memory, prompts):
        yield every, nullcontext()
        return
    decided = _decided(model, memory, prompts, token_budget)
    yield [i for i in every if not decided[i]], memory.unedited()
    yield [i for i in every if decided[i]], nullcontext()


def _worth_dividing(model: LanguageModel, memory: PromptMemory, prompts: Sequence[Sequence[int]]) -> bool:
    if len(prompts) < 2:
        return False
    lengths = [len(ids) for ids in prompts]
    with memory.unedited():
        return trees(model, prompts, max(ROW_LENGTH, *lengths), sum(lengths), WORTH) is not None


@torch.no_grad()
def _decided(
    model: LanguageModel, memory: PromptMemory, prompts: Sequence[Sequence[int]], token_budget: int
) -> list[bool]:
    """Return which prompts a memory may answer, from passes in which they share their beginnings."""
    found = [True] * len(prompts)
    with memory.unedited(), model.frozen_mode():
        for group in by_length([len(ids) for ids in prompts], token_budget):
            ids, mask = model.tokens.pad([prompts[i] for i in group], model.device)
            packed = pack(model, ids, mask)
            with memory.watch(len(packed.inputs["input_ids"]), stop=True) as which_answered:
                model(**packed.inputs)
            paths = [path[: len(prompts[i])] for i, path in zip(group, packed.place.tolist(), strict=True)]
            for i, one in zip(group, which_answered(packed.row[:, 0].tolist(), paths), strict=True):
                found[i] = one
    return found


def trees(
    model: LanguageModel, sequences: Sequence[Sequence[int]], length: int, tokens: int, most: float = PAYS
) -> list[TreeRow] | None:
    """Return rows in which sequences share prefixes; ``None`` if they are unsupported or not faster.

    Args:
        model: The language model.
        sequences: Token ids.
        length: Tokens per row.
        tokens: Number of tokens of plain rows, to compare with.
        most: Largest share of those tokens that may remain.
    """
    if not shares_beginnings(model):
        return None
    rows = grow(sequences, length)
    if sum(len(row.ids) for row in rows) > most * tokens or max(map(len, sequences)) > model.tree_depth:
        return None
    return rows


def plain(ids: Tensor, mask: Tensor) -> Packed:
    """Return right-padded rows unchanged."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    rows, length = (torch.arange(size, device=ids.device) for size in ids.shape)
    return Packed(inputs, rows[:, None].expand_as(ids), length.expand_as(ids))


def arrangements(model: LanguageModel, ids: Tensor, mask: Tensor) -> Iterator[Packed]:
    """Yield what :func:`pack` returns, and then plain rows, for a pass whose logits were not finite.

    Zero times NaN is NaN: through the attention, a NaN of one sequence reaches all that share its row in a tree.
    """
    packed = pack(model, ids, mask)
    yield packed
    if packed.inputs["input_ids"] is not ids:
        yield plain(ids, mask)


def pack(model: LanguageModel, ids: Tensor, mask: Tensor) -> Packed:
    """Arrange right-padded rows as trees if that is faster, else leave them unchanged."""
    sequences = [row[:length] for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
    grown = trees(model, sequences, max(ROW_LENGTH, ids.shape[1]), ids.numel())
    if grown is None:
        return plain(ids, mask)
    row, place = torch.zeros(2, *ids.shape, dtype=torch.long)
    for number, tree in enumerate(grown):
        for index, path in tree.paths.items():
            row[index] = number
            place[index, : len(path)] = torch.tensor(path)
    inputs = tree_inputs(grown, model.tokens.pad_id, model.model.dtype, model.device)
    return Packed(inputs, row.to(ids.device), place.to(ids.device))
