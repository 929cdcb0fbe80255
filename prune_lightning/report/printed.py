"""What a run prints at its end, and what `prune-lightning report` prints of it later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from prune_lightning.report.headline import names, sentence
from prune_lightning.report.labels import Labels
from prune_lightning.report.table import result_table


def columns_of(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the columns of a run's table: the unedited model, the edited one, and that of the control run."""
    restraint, control = names(summary)[1], summary.get("control")
    count = summary.get("num_requests", 0)
    title = f"with {restraint}" if control else f"after {count:,} edit{'s' * (count != 1)}"
    columns = {"before": summary.get("baseline", {}), title: summary.get("final", {})}
    return columns | ({f"without {restraint}": control["final"]} if control else {})


def compared_of(summary: Mapping[str, Any]) -> list[str]:
    """Return the titles of the columns of which the better one is marked."""
    return list(columns_of(summary))[1:]


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run of `train.py`, or ``None`` if its edits have been changed since, or never ended.

    Args:
        folder: The run's folder.
    """
    summary, edits, steps = folder / "summary.json", folder / "edits.jsonl", folder / "ledger" / "steps.jsonl"
    if not (summary.is_file() and edits.is_file()):
        return None
    recorded = [line["request"] for line in _lines(edits)]
    if steps.is_file() and [request for step in _lines(steps) for request in step["requests"]] != recorded:
        return None
    found = json.loads(summary.read_text("utf-8"))
    return found if "final" in found else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def print_result(summary: Mapping[str, Any], out: Console, every: bool = False) -> None:
    """Print a run's sentence and its table.

    Args:
        summary: The run's summary.
        out: Where to print.
        every: Print every score, not only the main ones.
    """
    columns, labels = columns_of(summary), Labels(summary.get("labels"))
    counts = summary.get("num_cases", {})
    out.print(Text(sentence(summary), "bold"))
    if about := [f"{name}: {summary[name]}" for name in ("data", "model") if name in summary]:
        out.print(Text(", ".join(about), "dim"))
    out.print(result_table(columns, labels, compared_of(summary), counts, every))
    if not every:
        out.print(Text("The main scores; all of them are in report.html.", "dim"))
