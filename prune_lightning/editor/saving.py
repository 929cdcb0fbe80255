"""Saves an edited model of which no folder of weights can hold the edits: their record, which restores it exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

from prune_lightning.atomic_files import write_json
from prune_lightning.export.exporting import MANIFEST, ExportReport, beside

NOTE = "the edits lie beside the weights: load the model with prune_lightning.Editor.open, not from_pretrained"


def save_record(ledger: Path, folder: str | Path, base_model: str, overwrite: bool) -> ExportReport:
    """Copy the record of the edits.

    Args:
        ledger: Its folder.
        folder: The folder to write.
        base_model: Path of the unedited model, for the manifest.
        overwrite: Whether to replace an earlier one.

    Raises:
        UserError: The folder exists.
    """
    target = Path(folder).expanduser()
    with beside(target, overwrite) as partial:
        shutil.copytree(ledger, partial / ledger.name)
        write_json(partial / MANIFEST, {"format": "record", "base_model": base_model, "note": NOTE})
        megabytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) / 1e6
    return ExportReport("record", str(target), megabytes, 0, 0.0, 0.0, 0.0, 0.0, {"note": NOTE})
