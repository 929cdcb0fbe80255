"""The table at the end of a run: the main scores, or every score, grouped by measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from prune_lightning.report.labels import Labels

SHORT = 12
_FIRST = ("edit", "stream", "ability")


def figure(value: Any) -> str:
    """Return a score as text: three decimals, or three digits where it is large or small.

    >>> figure(0.5), figure(1234.5), figure(0.000123), figure(0.0)
    ('0.500', '1.23e+03', '0.000123', '0.000')
    """
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.3g}"


def percent(value: Any) -> str:
    r"""Return a share in per cent; only what is none or all is written as such.

    >>> percent(0.836), percent(0.001), percent(0.999), percent(1.0), percent(float("nan"))
    ('84\xa0%', '<1\xa0%', '>99\xa0%', '100\xa0%', '–')
    """
    if value is None or value != value:
        return "–"
    if 0 < value < 0.005:
        return "<1\xa0%"
    if 0.995 <= value < 1:
        return ">99\xa0%"
    return f"{100 * value:.0f}\xa0%".replace("-0\xa0", "0\xa0").replace("-", "−")


@dataclass(frozen=True)
class Row:
    """A score in the table.

    Args:
        key: Its key.
        label: Its name.
        arrow: Points to the better values; may be empty.
        cells: Its value in each column, as text; a value that is only a lower bound has ``>`` before it.
        best: Index of the best of the columns compared; ``None`` if there is none.
    """

    key: str
    label: str
    arrow: str
    cells: tuple[str, ...]
    best: int | None = None

    @property
    def name(self) -> str:
        """The label with the arrow."""
        return f"{self.label} {self.arrow}".rstrip()


def rows(
    columns: Mapping[str, Mapping[str, Any]],
    labels: Labels | None = None,
    compared: Sequence[str] = (),
    keys: Sequence[str] | None = None,
) -> dict[str, list[Row]]:
    """Return a row per score, by the title of its measurement.

    Counters of failures that are 0 throughout, and scores without any value, are left out.

    Args:
        columns: Scores by column title.
        labels: Names of scores; the words of their keys if not given.
        compared: Titles of the columns of which the better one is found.
        keys: The scores to show; all by default.
    """
    names = labels or Labels()
    every = list(dict.fromkeys(key for scores in columns.values() for key in scores))
    chosen = [key for key in every if (keys is None or key in keys) and _says_something(columns, key, names)]

    def place(key: str) -> tuple[int, str, int, int]:
        first = key.split("/")[0]
        group = _FIRST.index(first) if first in _FIRST else len(_FIRST)
        return group, names.measurement(key), names.place(key), every.index(key)

    result: dict[str, list[Row]] = {}
    for key in sorted(chosen, key=place):
        cells = tuple(_cell(scores, key) for scores in columns.values())
        row = Row(key, names.label(key), names.arrow(key), cells, _best(columns, key, names, compared))
        result.setdefault(names.title(key), []).append(row)
    return result


def _says_something(columns: Mapping[str, Mapping[str, Any]], key: str, labels: Labels) -> bool:
    values = [scores.get(key) for scores in columns.values()]
    known = [value for value in values if value is not None and value == value]
    return not key.endswith("_censored") and (any(known) if labels.counter(key) else bool(known))


def _cell(scores: Mapping[str, Any], key: str) -> str:
    above = "> " if scores.get(f"{key}_censored") else ""
    return above + figure(scores.get(key))


def _best(columns: Mapping[str, Mapping[str, Any]], key: str, labels: Labels, compared: Sequence[str]) -> int | None:
    """Return the index of the best column compared; ``None`` if two look the same, or if better is not defined."""
    higher = labels.higher_is_better(key)
    titles = [title for title in compared if key in columns[title]]
    if higher is None or len(titles) < 2 or len({_cell(columns[title], key) for title in titles}) == 1:
        return None

    def quality(title: str) -> float:
        value = columns[title].get(key)
        return -math.inf if value is None or value != value else (value if higher else -value)

    return list(columns).index(max(titles, key=quality))


def result_table(
    columns: Mapping[str, Mapping[str, Any]],
    labels: Labels | None = None,
    compared: Sequence[str] = (),
    num_cases: Mapping[str, int] | None = None,
    every: bool = False,
) -> Table:
    """Return the table for the terminal.

    Args:
        columns: Scores by column title, the last ones being those of edited models.
        labels: Names of scores; the words of their keys if not given.
        compared: Titles of the columns of which the better one is bold.
        num_cases: Number of cases behind each score.
        every: Show every score, not only the :data:`SHORT` main ones.
    """
    names, counts = labels or Labels(), num_cases or {}
    table = Table()
    table.add_column("")
    for column in ("n", *columns):
        table.add_column(Text(column), justify="right")
    grouped = rows(columns, names, compared, None if every else main_keys(columns, names))
    for group, lines in grouped.items():
        if every:
            table.add_row(Text(group, "bold"))
        for line in lines:
            cells = [Text(cell, "bold" if i == line.best else "") for i, cell in enumerate(line.cells)]
            count = counts.get(line.key)
            table.add_row(Text(line.name), Text("" if count is None else f"{count:,}"), *cells)
        table.add_section()
    return table


def main_keys(columns: Mapping[str, Mapping[str, Any]], labels: Labels) -> list[str]:
    """Return the keys of the main scores that have a value."""
    latest = list(columns.values())[1:] or list(columns.values())
    scores = {key: value for part in reversed(latest) for key, value in part.items()}
    return labels.short({k: v for k, v in scores.items() if _says_something(columns, k, labels)}, SHORT)
