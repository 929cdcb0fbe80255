"""A table of runs with their headline figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from prune_lightning.errors import UserError
from prune_lightning.report.headline import names, tiles
from prune_lightning.report.labels import QUANTITIES
from prune_lightning.report.table import percent


def run_table(folder: str | Path) -> Table:
    """Return a row per run below a folder, the newest first: what ran, and how it ended.

    Args:
        folder: The folder; runs are found at any depth by their ``summary.json`` or their ledger.

    Raises:
        UserError: There is no such folder, or no run in it.
    """
    folder = Path(folder).expanduser()
    marks = [*folder.rglob("summary.json"), *(path.parent for path in folder.rglob("ledger/base.json"))]
    found = {mark.parent: mark.stat().st_mtime for mark in marks}
    if not found:
        raise UserError(f"there are no runs in {str(folder)!r}")
    table = Table("run", "method", "restraint", "model", "edits", *(f"{name} ↑" for name in QUANTITIES))
    for run in sorted(found, key=lambda run: found[run], reverse=True):
        table.add_row(*(text.replace("[", r"\[") for text in _row(folder, run)))
    return table


def _row(folder: Path, run: Path) -> list[str]:
    name = str(run.relative_to(folder)) if run != folder else str(run)
    summary = _read(run / "summary.json")
    if not summary:
        base = _read(run / "ledger" / "base.json")
        steps = run / "ledger" / "steps.jsonl"
        count = sum(len(json.loads(line)["requests"]) for line in steps.read_text("utf-8").splitlines() if line)
        model = str((base.get("model") or {}).get("path", ""))
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
