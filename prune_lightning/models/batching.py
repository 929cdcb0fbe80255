"""Batches of rows with similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TOKEN_BUDGET = 8192
LOGITS = 2**26
"""Largest number of logits of a forward pass of several rows: 0.27 GB in fp32."""


def within_logits(budget: int, vocabulary: int) -> int:
    """Return a token budget such that the logits at all tokens stay within :data:`LOGITS`."""
    return min(budget, max(1, LOGITS // vocabulary))


def by_length(lengths: Sequence[int], budget: int, logits: Sequence[int] = ()) -> Iterator[list[int]]:
    """Yield indices grouped by similar length.

    Args:
        lengths: Tokens of each row.
        budget: Largest number of tokens of a group, padded.
        logits: Number of logits that each row needs; those of a group stay within :data:`LOGITS`. Not limited if empty.
    """
    group: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        needed = logits[index] if logits else 0
        if group and ((len(group) + 1) * lengths[index] > budget or held + needed > LOGITS):
            yield group
            group, held = [], 0
        group.append(index)
        held += needed
    if group:
        yield group
