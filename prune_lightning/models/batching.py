"""Batches of rows with similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TOKEN_BUDGET = 8192


def by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield indices grouped by similar length such that padded rows stay within ``budget`` tokens."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[index] > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
