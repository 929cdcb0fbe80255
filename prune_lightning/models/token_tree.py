"""Rows of tokens in which sequences share common prefixes.

Two targets of one prompt, or prompts with the same first words, are branches of a tree. A row contains such trees with
every node once. A node attends to its ancestors and itself, and its position is its depth. So its output equals that of
an ordinary forward pass, and nothing is computed twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

import numpy as np
import torch
from torch import Tensor

ROW_LENGTH = 256


@dataclass
class TreeRow:
    """One row.

    Attributes:
        ids: Token of each node.
        depth: Its position in its sequences.
        parent: Index of the preceding node; a root is its own parent.
        paths: The nodes of each sequence's tokens, by its index.
    """

    ids: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)

    def add(self, index: int, sequence: Sequence[int], shared: list[int]) -> list[int]:
        """Add a sequence whose first tokens are the nodes ``shared``, and return its path."""
        path = list(shared)
        for token in sequence[len(shared) :]:
            node = len(self.ids)
            self.ids.append(token)
            self.depth.append(len(path))
            self.parent.append(path[-1] if path else node)
            path.append(node)
        self.paths[index] = path
        return path

    def sees(self, length: int) -> np.ndarray:
        """Return the nodes to which each node attends, shape ``(length, length)``; padding attends to itself."""
        sees = np.eye(length, dtype=bool)
        for node, parent in enumerate(self.parent):
            sees[node] |= sees[parent]
        return sees


def grow(sequences: Sequence[Sequence[int]], length: int = ROW_LENGTH) -> list[TreeRow]:
    """Pack sequences, sorted so that common prefixes are adjacent, into as few rows as possible, equally long ones.

    Args:
        sequences: Token ids.
        length: Nodes per row at most; a longer sequence gets a row of its own length.
    """
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    shared = [0, *(_common(sequences[a], sequences[b]) for a, b in pairwise(order))]

    def starts(limit: int) -> list[int]:
        """Return the places in ``order`` at which rows of ``limit`` nodes start."""
        found: list[int] = []
        nodes = 0
        for place, index in enumerate(order):
            nodes += len(sequences[index]) - shared[place]
            if not found or nodes > limit:
                found.append(place)
                nodes = len(sequences[index])
        return found

    fewest = len(starts(length))
    begins = set(starts(bisect_left(range(length), True, key=lambda limit: len(starts(limit)) <= fewest)))
    rows: list[TreeRow] = []
    path: list[int] = []
    for place, index in enumerate(order):
        if place in begins:
            rows.append(TreeRow())
            path = []
        path = rows[-1].add(index, sequences[index], path[: shared[place]])
    return rows


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of first tokens that two sequences share."""
    equal = (a == b for a, b in zip(one, other, strict=False))
    return sum(takewhile(bool, equal))


def tree_inputs(rows: Sequence[TreeRow], pad_id: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return a model's inputs for some rows.

    Args:
        rows: The rows.
        pad_id: Padding id of shorter rows.
        dtype: Dtype of the additive attention mask, the model's.
        device: Device of the inputs.

    Returns:
        ``input_ids`` and ``position_ids``, both ``(rows, longest)``, and ``attention_mask``, ``(rows, 1, longest,
        longest)``: zero where a node attends, the dtype's lowest value elsewhere.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    positions = torch.zeros_like(ids)
    sees = np.stack([row.sees(longest) for row in rows])
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        positions[i, : len(row.ids)] = torch.tensor(row.depth)
    hidden = torch.from_numpy(~sees)[:, None].to(device)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
    return {"input_ids": ids.to(device), "position_ids": positions.to(device), "attention_mask": mask}
