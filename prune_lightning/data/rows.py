"""Requests and rejected records with their line numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_lightning.errors import shown
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


def repeated(usable: Sequence[Located], kept: Sequence[Located], by_subject: bool = True) -> list[BadRow]:
    """Return the usable records that are not among those kept, since another one has their subject, or their edit.

    Args:
        usable: All usable records.
        kept: Those of the stream.
        by_subject: Whether the records were left out by their subject, or else by their edit.
    """
    present = {id(one.request) for one in kept}
    lines: dict[str | tuple[str, str], int] = {one.request.subject.lower(): one.line for one in kept}
    lines |= {one.request.fact: one.line for one in kept}
    found = []
    for one in usable:
        if id(one.request) not in present:
            reason = (
                f"its subject {shown(one.request.subject)} is that of line {lines[one.request.subject.lower()]} "
                "(data.unique_subjects=false keeps both)"
                if by_subject
                else f"it repeats the edit of line {lines[one.request.fact]}"
            )
            found.append(BadRow(one.line, reason))
    return found


def listed(title: str, rows: Sequence[BadRow], limit: int = 20) -> str:
    """Return a message that lists the first ``limit`` rows by line."""
    lines = "\n".join(f"  line {row.line}: {row.reason}" for row in rows[:limit])
    return f"{title}:\n{lines}" + (f"\n  and {len(rows) - limit} more" if len(rows) > limit else "")
