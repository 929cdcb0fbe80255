"""What an editor returns: tables that print in a terminal and render in a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from rich.console import Console
from rich.table import Table

from prune_lightning.report.labels import Labels
from prune_lightning.report.table import main_keys, rows
from prune_lightning.types import EditRequest


class Tabular:
    """A result that is shown as a table."""

    def header(self) -> list[str]:
        """Return the titles of the columns."""
        raise NotImplementedError

    def cells(self) -> Iterator[Sequence[str]]:
        """Yield the rows."""
        raise NotImplementedError

    def table(self) -> Table:
        """Return the table for a terminal."""
        table = Table(*self.header())
        for row in self.cells():
            table.add_row(*(text.replace("[", r"\[") for text in row))
        return table

    def __str__(self) -> str:
        """Return the table as text."""
        console = Console(width=120, record=True, file=io.StringIO(), color_system=None, force_jupyter=False)
        console.print(self.table())
        return console.export_text().rstrip()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(title)}</th>" for title in self.header())
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True, repr=False)
class Answers(Tabular):
    """The model's answers before and after the edits.

    Args:
        prompts: The prompts.
        before: The unedited model's answers.
        after: The edited model's answers.
        wanted: The new answers of the edits whose prompts these are; empty for other prompts.
        holds: Whether the edited model gives each of them.
    """

    prompts: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]
    wanted: Sequence[str] = ()
    holds: Sequence[bool] = ()

    def header(self) -> list[str]:
        """Return the titles of the columns."""
        return ["prompt", "before", "after", *(["edit"] if self.wanted else [])]

    def cells(self) -> Iterator[Sequence[str]]:
        """Yield a row per prompt, each text on one line."""
        edits = [f"{'✓' if held else '✗'} {text}" for text, held in zip(self.wanted, self.holds, strict=True)]
        for row in zip(self.prompts, self.before, self.after, *([edits] if edits else []), strict=True):
            yield [" ".join(text.split()) for text in row]

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self)


@dataclass(frozen=True)
class Refused:
    """An edit that was not written.

    Args:
        request: The edit.
        reason: Why it was refused.
    """

    request: EditRequest
    reason: str


@dataclass(frozen=True, repr=False)
class Edited(Tabular):
    """The outcome of :meth:`Editor.edit`.

    Args:
        written: The facts that were written, in order.
        refused: The facts that were not written.
        seconds: Time of the edits.
    """

    written: Sequence[EditRequest]
    refused: Sequence[Refused]
    seconds: float

    def header(self) -> list[str]:
        """Return the titles of the columns."""
        return ["prompt", "new answer", ""]

    def cells(self) -> Iterator[Sequence[str]]:
        """Yield a row per fact."""
        for request in self.written:
            yield request.prompt, request.target_new, "written"
        for refused in self.refused:
            yield refused.request.prompt, refused.request.target_new, f"refused: {refused.reason}"

    def __repr__(self) -> str:
        """Return one line."""
        count = len(self.written)
        refused = "".join(f"\n  refused: {one.request.prompt!r}: {one.reason}" for one in self.refused)
        return f"{count} {'fact' if count == 1 else 'facts'} written in {self.seconds:.1f} s{refused}"


@dataclass(frozen=True, repr=False)
class Scores(Tabular):
    """Scores of the unedited and of the edited model over all edits; see docs/evaluation.md for their meaning.

    The table has the main scores, without those for which the facts hold no prompts; :meth:`all` has the others, too.

    Args:
        before: Scores of the unedited model, by key.
        after: Scores of the edited model, by key.
        num_edits: Number of edits.
        labels: Names of the scores.
        answers: The answers to the prompts of the edits.
        every: Whether the table has every score.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    num_edits: int
    labels: Labels = field(default_factory=Labels)
    answers: Answers | None = None
    every: bool = False

    def header(self) -> list[str]:
        """Return the titles of the columns."""
        return ["score", "before", f"after {self.num_edits} edit{'s' * (self.num_edits != 1)}"]

    def cells(self) -> Iterator[Sequence[str]]:
        """Yield a row per score."""
        columns = self._columns()
        keys = None if self.every else main_keys(columns, self.labels)
        for title, lines in rows(columns, self.labels, keys=keys).items():
            for line in lines:
                yield f"{title}: {line.name}" if self.every else line.name, *line.cells

    def all(self) -> Scores:
        """Return the table with every score that has a value, not only the main ones."""
        return replace(self, every=True)

    def _columns(self) -> dict[str, Mapping[str, float]]:
        return {"before": self.before, "after": self.after}

    def __getitem__(self, key: str) -> float:
        """Return a score of the edited model by its key."""
        return self.after[key]

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self)
