"""Requests and rejected records with their line numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_lightning.types import EditRequest


@dataclass(frozen=True)
class BadRow:
    """A record that is left out, with its first line and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Located:
    """A request with its position in its source.

    Args:
        request: The request.
        line: Its first line, or its number, from 1.
        remarks: Remarks about doubtful points.
    """

    request: EditRequest
    line: int
    remarks: tuple[str, ...] = ()


def listed(title: str, rows: Sequence[BadRow], limit: int = 20) -> str:
    """Return a message that lists the first ``limit`` rows by line."""
    lines = "\n".join(f"  line {row.line}: {row.reason}" for row in rows[:limit])
    return f"{title}:\n{lines}" + (f"\n  and {len(rows) - limit} more" if len(rows) > limit else "")
