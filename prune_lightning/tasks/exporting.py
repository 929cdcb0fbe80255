"""Exports at the end of an editing run, into ``export/FORMAT`` of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.export.exporting import as_json, export
from prune_lightning.export.sources import ExportedMatrix, ExportSource, Provenance
from prune_lightning.methods.base import EditingModule
from prune_lightning.tasks.presets import load_model
from prune_lightning.tasks.setup import choice, first_process


def export_all(
    wanted: list[str], config: DictConfig, folder: Path, module: EditingModule, stream: EditStream, out: Console
) -> list[dict[str, Any]]:
    """Export the live module. A failure is reported and not raised, so that the run keeps its results.

    Every process calls this, and the first one writes. A sharded model is exported from a whole one on the CPU.

    Returns:
        One report per format; a failed one has the key ``failed``. None on other processes.
    """
    if not wanted:
        return []
    gathered = _gathered(module) if module.language_model.is_sharded else []
    if not first_process():
        return []
    lines = (folder / "edits.jsonl").read_text("utf-8").splitlines()
    written = [json.loads(line)["applied"] for line in lines]
    requests = [request for request, applied in zip(stream.requests, written, strict=False) if applied]
    origin = Provenance(
        config.model.path, config.model.revision, choice("method"), choice("restraint"), tuple(requests)
    )
    if gathered:
        model = load_model(config)
        for matrix, weight in gathered:
            model.model.get_parameter(matrix.name).detach().copy_(matrix.stored(weight))
        source = ExportSource(model, [matrix for matrix, _ in gathered], origin)
    else:
        source = ExportSource.from_module(module, origin)
    reports: list[dict[str, Any]] = []
    for name in wanted:
        try:
            report = export(source, folder / "export" / name, name, overwrite=True, merged=config.export_merged)
        except UserError as error:
            reports.append({"format": name, "failed": str(error)})
            continue
        out.print(report.line(), markup=False)
        reports.append(as_json(report))
    return reports


def _gathered(module: EditingModule) -> list[tuple[ExportedMatrix, Tensor]]:
    """Return the edited matrices with their live weights, on the CPU; one at a time is gathered."""
    cpu = torch.device("cpu")
    matrices = module.edited_matrices().values()
    return [(ExportedMatrix.of(matrix).to(cpu), matrix.weight().to(cpu)) for matrix in matrices]


def raise_failed(reports: list[dict[str, Any]]) -> None:
    """Raise a :class:`UserError` that names the failed exports, if there are any."""
    failed = [f"export={report['format']} failed: {report['failed']}" for report in reports if "failed" in report]
    if failed:
        raise UserError("the run is complete, but " + "; ".join(failed))
