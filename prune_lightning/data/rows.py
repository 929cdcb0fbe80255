"""Records with their lines: requests, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_lightning.types import EditRequest


@dataclass(frozen=True)
class BadRow:
    """A record that is left out, with the line it begins on and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Located:
    """A request with its place in its source.

    Args:
        request: The request.
        line: The line it begins on, or its number, counted from 1.
        remarks: What is doubtful about it.
    """

    request: EditRequest
    line: int
    remarks: tuple[str, ...] = ()


def listed(title: str, rows: Sequence[BadRow], limit: int = 20) -> str:
    """Return a message that lists rows by line, the first ones of many."""
    lines = "\n".join(f"  line {row.line}: {row.reason}" for row in rows[:limit])
    return f"{title}:\n{lines}" + (f"\n  and {len(rows) - limit} more" if len(rows) > limit else "")
