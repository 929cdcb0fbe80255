"""A table of runs with their headline figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prune_lightning.errors import UserError
from prune_lightning.report.headline import names, tiles
from prune_lightning.report.labels import QUANTITIES
from prune_lightning.report.table import percent


def run_table(folder: str | Path, model_name: Callable[[str], str] = str) -> Table:
    """Return a row per run below a folder, the newest first: what ran, and how it ended.

    Args:
        folder: The folder; runs are found at any depth by their ``summary.json`` or their ledger.
        model_name: Gives the name of the model at a path.

    Raises:
        UserError: There is no such folder, or no run in it.
    """
    folder = Path(folder).expanduser()
    marks = [*folder.rglob("summary.json"), *(path.parent for path in folder.rglob("ledger/base.json"))]
    found = {mark.parent: mark.stat().st_mtime for mark in marks}
    if not found:
        raise UserError(f"there are no runs in {str(folder)!r}")
    rows = [_row(folder, run, model_name) for run in sorted(found, key=lambda run: found[run], reverse=True)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")  # a name that was cut off could not be used
    table.add_column("setup")
    figures = ["edits", *QUANTITIES]
    filled = [place for place in range(len(figures)) if any(row[2 + place] for row in rows)]
    for place in filled:
        table.add_column(figures[place], justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in (*row[:2], *(row[2 + place] for place in filled))))
    return table


def _row(folder: Path, run: Path, model_name: Callable[[str], str]) -> list[str]:
    """Return the run's name; its method, restraint and model; the number of edits; and the four quantities."""
    name = str(run.relative_to(folder)) if run != folder else str(run)
    summary = _read(run / "summary.json")
    if not summary:
        base = _read(run / "ledger" / "base.json")
        steps = run / "ledger" / "steps.jsonl"
        count = sum(len(json.loads(line)["requests"]) for line in steps.read_text("utf-8").splitlines() if line)
        model = model_name(str((base.get("model") or {}).get("path", "")))
        return [name, _listed(*names(base), model), f"{count:,}", *[""] * len(QUANTITIES)]
    model, count = str(summary.get("model", "")), int(summary.get("num_requests", 0))
    shares = [percent(tile.value) if tile.key else "" for tile in tiles(summary)]
    return [name, _listed(*names(summary), model), f"{count:,}", *shares]


def _listed(*words: str) -> str:
    return ", ".join(filter(None, words))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
