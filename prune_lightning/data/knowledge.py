"""Keeps the records of a stream whose old answer the unedited model gives, or those whose old answer it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prune_lightning.data.rows import BadRow, Located
from prune_lightning.errors import UserError, one_of, shown
from prune_lightning.types import EditRequest

ALL, KNOWN, UNKNOWN = "all", "known", "unknown"
EXACT, FIRST = "exact_match", "first_token"
WINDOW = 64  # records that are scored together

Knows = Callable[[Sequence[EditRequest]], Sequence[bool]]
"""Returns, for each request, whether the unedited model gives its old answer."""


@dataclass(frozen=True)
class KeepRule:
    """Which records a stream keeps, by what the unedited model knows.

    Args:
        keep: ``all``; ``known`` for those whose old answer the model gives; ``unknown`` for the others.
        known_by: What counts as giving the answer, in greedy decoding: ``exact_match``, every token of it, or
            ``first_token``.

    Raises:
        UserError: An unknown choice.
    """

    keep: str = ALL
    known_by: str = EXACT

    def __post_init__(self) -> None:
        one_of("data.keep", self.keep, (ALL, KNOWN, UNKNOWN))
        one_of("data.known_by", self.known_by, (EXACT, FIRST))

    @property
    def needs_model(self) -> bool:
        """Whether the choice depends on the model."""
        return self.keep != ALL

    def divide(self, candidates: Sequence[Located], knows: Knows, count: int | None) -> Division:
        """Examine records in their order until ``count`` of them are kept.

        Args:
            candidates: The records.
            knows: See :data:`Knows`; called with :data:`WINDOW` records at most.
            count: Number of records to keep; ``None`` examines all.

        Raises:
            UserError: No record is kept.
        """
        kept: list[Located] = []
        left_out: list[BadRow] = []
        known = 0
        for one, known_here in self._examined(candidates, knows):
            known += known_here is True
            if reason := self._reason(one.request, known_here):
                left_out.append(BadRow(one.line, reason))
            else:
                kept.append(one)
            if len(kept) == count:
                break
        if not kept:
            raise UserError(
                f"data.keep={self.keep} leaves no record: of {len(left_out)}, the model knows {known} "
                f"(data.known_by={self.known_by})"
            )
        return Division(self, kept, left_out, known)

    @staticmethod
    def _examined(candidates: Sequence[Located], knows: Knows) -> Iterator[tuple[Located, bool | None]]:
        """Yield each record with whether the model knows it; ``None`` without an old answer."""
        for start in range(0, len(candidates), WINDOW):
            window = candidates[start : start + WINDOW]
            asked = [one for one in window if one.request.target_old]
            answers = iter(knows([one.request for one in asked]) if asked else ())
            for one in window:
                yield one, next(answers) if one.request.target_old else None

    def _reason(self, request: EditRequest, known: bool | None) -> str | None:
        if known is None:
            return f"it has no `target_old`, which data.keep={self.keep} needs"
        if known is (self.keep == KNOWN):
            return None
        verb = "gives" if known else "does not give"
        return f"the unedited model {verb} its old answer {shown(request.target_old)} (data.keep={self.keep})"


@dataclass(frozen=True)
class Division:
    """The records that a :class:`KeepRule` keeps, and those that it leaves out.

    Args:
        rule: The rule.
        kept: Records to keep, in order.
        left_out: The others among those examined, with the reason.
        known: Number of examined records that the model knows.
    """

    rule: KeepRule
    kept: list[Located]
    left_out: list[BadRow]
    known: int

    def summary(self) -> dict[str, Any]:
        """Return the rule and the counts."""
        examined = len(self.kept) + len(self.left_out)
        return {
            "keep": self.rule.keep,
            "known_by": self.rule.known_by,
            "examined": examined,
            "known": self.known,
            "kept": len(self.kept),
        }

    def line(self) -> str:
        """Return the counts in one line."""
        examined = len(self.kept) + len(self.left_out)
        return (
            f"data.keep={self.rule.keep}: the model knows {self.known} of {examined} records "
            f"({self.rule.known_by}); {len(self.kept)} are kept, summary.json lists the others"
        )
