"""Default layers of models without published ones, at the relative depth of published layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def single(num_layers: int) -> list[int]:
    """Return the layer for one-layer methods: 17 % of the depth, as for Llama (5 of 32) and GPT-J (5 of 28)."""
    return [round(0.17 * num_layers)]


def window(num_layers: int) -> list[int]:
    """Return the layers for methods that spread an edit: up to five around the single one, in the lowest quarter."""
    (middle,) = single(num_layers)
    return list(range(max(0, middle - 1), max(middle, min(middle + 3, num_layers // 4)) + 1))


def top(num_layers: int) -> list[int]:
    """Return the three highest layers, those of every published MEND."""
    return list(range(max(0, num_layers - 3), num_layers))


def fine_tuning(num_layers: int) -> list[int]:
    """Return the layer for fine-tuning: two thirds of the depth, as for Llama (21 of 32)."""
    return [min(round(2 * num_layers / 3), num_layers - 1)]


def late(num_layers: int) -> list[int]:
    """Return the layer for LocFT-BF: 69 % of the depth, as for Llama (22 of 32)."""
    return [min(round(22 * num_layers / 32), num_layers - 1)]


def memory(num_layers: int) -> list[int]:
    """Return the layer for editors with a memory at one block: 84 % of the depth, as for Llama (27 of 32)."""
    return [min(round(27 * num_layers / 32), num_layers - 1)]


def experts(num_layers: int) -> list[int]:
    """Return the layers for ELDER: six from 66 % of the depth, as for Llama (21 to 26 of 32), fewer of a shallow model.

    The first is 1 or later, since ELDER reads the block below it.
    """
    count = max(1, min(6, max(3, num_layers // 2), num_layers - 1))
    first = min(round(21 * num_layers / 32), num_layers - count)
    return list(range(first, first + count))


FROM_DEPTH: Mapping[str, Callable[[int], list[int]]] = {
    "single": single,
    "window": window,
    "top": top,
    "fine_tuning": fine_tuning,
    "late": late,
    "memory": memory,
    "experts": experts,
}
"""Functions from the number of layers to the layers to edit, by purpose."""
