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


def repeated(usable: Sequence[Located], kept: Sequence[Located]) -> list[BadRow]:
    """Return the usable records that are not among those kept, since another one has their subject or their edit."""
    present = {id(one.request) for one in kept}
    subjects = {one.request.subject.lower(): one.line for one in kept}
    edits = {one.request.fact: one.line for one in kept}
    found = []
    for one in usable:
        if id(one.request) not in present:
            subject = one.request.subject
            reason = (
                f"its subject {shown(subject)} is that of line {subjects[subject.lower()]} "
                "(data.unique_subjects=false keeps both)"
            )
            if line := edits.get(one.request.fact):
                reason = f"it repeats the edit of line {line}"
            found.append(BadRow(one.line, reason))
    return found


def listed(title: str, rows: Sequence[BadRow], limit: int = 20) -> str:
    """Return a message that lists the first ``limit`` rows by line."""
    lines = "\n".join(f"  line {row.line}: {row.reason}" for row in rows[:limit])
    return f"{title}:\n{lines}" + (f"\n  and {len(rows) - limit} more" if len(rows) > limit else "")
