"""Batches of rows with similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TOKEN_BUDGET = 8192
LOGITS = 2**26
"""Largest number of logits of a forward pass that computes them at every token: 0.27 GB in fp32."""


def within_logits(budget: int, vocabulary: int) -> int:
    """Return a token budget such that the logits at all tokens stay within :data:`LOGITS`."""
    return min(budget, max(1, LOGITS // vocabulary))


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
