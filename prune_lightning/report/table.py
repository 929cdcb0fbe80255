"""The table at the end of a run: every score, grouped by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from prune_lightning.report.labels import Labels

_FIRST = ("edit", "stream", "ability")


def figure(value: Any) -> str:
    """Return a score as text: three decimals, or three digits where it is large or small.

    >>> figure(0.5), figure(1234.5), figure(0.000123), figure(0.0)
    ('0.500', '1.23e+03', '0.000123', '0.000')
    """
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.3g}"


def _cell(scores: Mapping[str, Any], key: str) -> str:
    above = "> " if scores.get(f"{key}_censored") else ""
    return above + figure(scores.get(key))


def rows(columns: Mapping[str, Mapping[str, Any]], labels: Labels | None = None) -> dict[str, list[list[str]]]:
    """Return, by group, a row per score: its name, then its value in each column.

    A censored value, which is only a lower bound, has ``>`` before it.

    Args:
        columns: Scores by column title.
        labels: Names of scores; their keys if not given.
    """
    keys = list(dict.fromkeys(key for scores in columns.values() for key in scores))
    names = labels or Labels()

    def place(key: str) -> tuple[int, str, int, int]:
        first = key.split("/")[0]
        group = _FIRST.index(first) if first in _FIRST else len(_FIRST)
        return group, names.measurement(key), names.place(key), keys.index(key)

    result: dict[str, list[list[str]]] = {}
    for key in sorted(keys, key=place):
        if not key.endswith("_censored"):
            row = [names.label(key), *(_cell(scores, key) for scores in columns.values())]
            result.setdefault(names.title(key), []).append(row)
    return result


def result_table(title: str, columns: Mapping[str, Mapping[str, Any]], labels: Labels | None = None) -> Table:
    """Return the table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for group, lines in rows(columns, labels).items():
        table.add_row(f"[bold]{group}[/bold]")
        for line in lines:
            table.add_row(*line)
        table.add_section()
    return table
