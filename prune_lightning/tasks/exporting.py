"""Exports at the end of an editing run, into ``export/FORMAT`` of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.export.exporting import as_json, export
from prune_lightning.export.sources import ExportSource, Provenance
from prune_lightning.methods.base import EditingModule
from prune_lightning.tasks.setup import choice


def export_all(
    wanted: list[str], config: DictConfig, folder: Path, module: EditingModule, stream: EditStream, out: Console
) -> list[dict[str, Any]]:
    """Export the live module. A failure is reported and not raised, so that the run keeps its results.

    Returns:
        One report per format; a failed one has the key ``failed``.
    """
    if not wanted:
        return []
    lines = (folder / "edits.jsonl").read_text("utf-8").splitlines()
    written = [json.loads(line)["applied"] for line in lines]
    requests = [request for request, applied in zip(stream.requests, written, strict=False) if applied]
    origin = Provenance(
        config.model.path, config.model.revision, choice("method"), choice("restraint"), tuple(requests)
    )
    source = ExportSource.from_module(module, origin)
    reports: list[dict[str, Any]] = []
    for name in wanted:
        try:
            report = export(source, folder / "export" / name, name, overwrite=True)
        except UserError as error:
            reports.append({"format": name, "failed": str(error)})
            continue
        out.print(report.line(), markup=False)
        reports.append(as_json(report))
    return reports


def raise_failed(reports: list[dict[str, Any]]) -> None:
    """Raise a :class:`UserError` that names the failed exports, if there are any."""
    failed = [f"export={report['format']} failed: {report['failed']}" for report in reports if "failed" in report]
    if failed:
        raise UserError("the run is complete, but " + "; ".join(failed))
