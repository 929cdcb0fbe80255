"""A table of runs with their headline figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    titles = ["run", "method", "restraint", "model", "edits", *(f"{name} ↑" for name in QUANTITIES)]
    rows = [_row(folder, run, model_name) for run in sorted(found, key=lambda run: found[run], reverse=True)]
    filled = [place for place in range(len(titles)) if any(row[place] for row in rows)]
    table = Table(*(titles[place] for place in filled))
    for row in rows:
        table.add_row(*(row[place].replace("[", r"\[") for place in filled))
    return table


def _row(folder: Path, run: Path, model_name: Callable[[str], str]) -> list[str]:
    name = str(run.relative_to(folder)) if run != folder else str(run)
    summary = _read(run / "summary.json")
    if not summary:
        base = _read(run / "ledger" / "base.json")
        steps = run / "ledger" / "steps.jsonl"
        count = sum(len(json.loads(line)["requests"]) for line in steps.read_text("utf-8").splitlines() if line)
        model = model_name(str((base.get("model") or {}).get("path", "")))
        return [name, *names(base), model, f"{count:,}", *[""] * len(QUANTITIES)]
    model, count = str(summary.get("model", "")), int(summary.get("num_requests", 0))
    shares = [percent(tile.value) if tile.key else "" for tile in tiles(summary)]
    return [name, *names(summary), model, f"{count:,}", *shares]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
