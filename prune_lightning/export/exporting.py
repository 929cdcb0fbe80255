"""Writes an export to a temporary folder, reloads it, compares it with the live model, and then renames it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from prune_lightning.atomic_files import disk_error, replaced_folder, write_json
from prune_lightning.errors import UserError
from prune_lightning.export.card import write_card
from prune_lightning.export.formats import RANKED, Format, format_named
from prune_lightning.export.sources import ExportSource, check_in_weights
from prune_lightning.export.verify import next_token_logits, prompts_for, reloaded_logits, tolerance

MANIFEST = "export.json"


@dataclass(frozen=True)
class ExportReport:
    """The result of an export, and its agreement with the live model.

    Args:
        format: Its format.
        folder: Its folder.
        megabytes: Size of all files, in units of 10^6 bytes.
        prompts: Number of prompts on which logits were compared.
        max_logit_error: Largest logit difference between the reloaded model and the one to export.
        tolerance: Largest accepted difference.
        moved: Largest logit difference between the live model and its base on these prompts, for comparison.
        truncation_error: Largest logit difference between the live model and one with changes truncated to ``rank``;
            zero without ``rank``.
        details: Details of the format, e.g. ranks; ``note`` is printed.
    """

    format: str
    folder: str
    megabytes: float
    prompts: int
    max_logit_error: float
    tolerance: float
    moved: float
    truncation_error: float
    details: dict[str, Any]

    def line(self) -> str:
        """Return one line for the terminal."""
        if not self.prompts:
            return f"saved {self.format}: {self.megabytes:.2f} MB in {self.folder}; {self.details['note']}"
        cut = f", cutting the rank moved logits by {self.truncation_error:.2g}" if self.truncation_error else ""
        return (
            f"exported {self.format}: {self.megabytes:.2f} MB in {self.folder}; reloaded, largest logit error "
            f"{self.max_logit_error:.2g} on {self.prompts} prompts (the edits moved them by {self.moved:.2g}{cut})"
            + (f"; {self.details['note']}" if "note" in self.details else "")
        )


def export(
    source: ExportSource,
    target: str | Path,
    format_name: str,
    rank: int | None = None,
    overwrite: bool = False,
    merged: bool = False,
    record: Path | None = None,
) -> ExportReport:
    """Export an edited model.

    The export is written to a temporary folder next to the target, loaded as a user would, compared on the prompts of
    the edits and a few others, and renamed. The comparison needs memory for a second copy of the model.

    Args:
        source: The edited model.
        target: The folder to write.
        format_name: Name of the format.
        rank: For ``lora`` and ``delta``: approximate each change by one of this rank at most.
        overwrite: Whether to replace an earlier export.
        merged: Merge a memory beside the weights into them. It then answers every prompt; the report says how far this
            moves the prompts that were left to the original weights.
        record: A folder that is copied into the export.

    Raises:
        UserError: The edits are not in the weights, the target exists, the format or rank is invalid, or the reloaded
            model differs from the live one; then nothing is written at the target.
    """
    chosen = format_named(format_name)
    if rank is not None and (rank < 1 or format_name not in RANKED):
        raise UserError(f"a rank of at least 1 belongs to the formats lora and delta, but got {rank} for {format_name}")
    check_in_weights(source.in_weights, source.memory is not None, merged, source.provenance.method, format_name)
    if merged:
        routed = next_token_logits(source.language_model, prompts_for(source.provenance.requests))
        with source.merged() as whole:
            return _exported(whole, Path(target).expanduser(), chosen, format_name, rank, overwrite, routed, record)
    return _exported(source, Path(target).expanduser(), chosen, format_name, rank, overwrite, record=record)


def _exported(
    source: ExportSource,
    target: Path,
    chosen: Format,
    format_name: str,
    rank: int | None,
    overwrite: bool,
    routed: Tensor | None = None,
    record: Path | None = None,
) -> ExportReport:
    """Export a model whose edits are in its weights.

    Args:
        source: The edited model.
        target: The folder to write.
        chosen: The format.
        format_name: Its name.
        rank: See :func:`export`.
        overwrite: See :func:`export`.
        routed: Logits with the memory that was merged into the weights.
        record: See :func:`export`.
    """
    prompts = prompts_for(source.provenance.requests)
    live = next_token_logits(source.language_model, prompts)
    with source.in_place(changed=False):
        base = next_token_logits(source.language_model, prompts)
    moved = _difference(base, live)
    expected = live
    if rank is not None:
        source = source.truncated(rank)
        with source.in_place(changed=True):
            expected = next_token_logits(source.language_model, prompts)
    with beside(target, overwrite) as folder:
        details = chosen.write(source, folder)
        if routed is not None:
            details = _with_notes(details, _without_routing(base, live, routed))
        error, allowed = _compare(source, chosen, folder, prompts, expected)
        figures = {"max_logit_error": error, "moved": moved, "truncation_error": _difference(expected, live)}
        write_card(folder, format_name, source, {**details, **figures})
        about = {"base_model": source.provenance.base_model, "weights": source.weights_metadata()}
        write_json(folder / MANIFEST, {"format": format_name, **about, **details, **figures, "tolerance": allowed})
        if record is not None:
            shutil.copytree(record, folder / record.name)
        megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return ExportReport(
        format_name, str(target), megabytes, len(prompts), tolerance=allowed, details=details, **figures
    )


def _without_routing(base: Tensor, merged: Tensor, routed: Tensor) -> dict[str, Any]:
    """Return what a model loses whose memory answers every prompt."""
    passed = (base == routed).all(1)  # by the memory, bit for bit
    moved = _difference(merged[passed], base[passed]) if passed.any() else 0.0
    count = int(passed.sum())
    note = f"merged, without routing: the {count} prompts that the memory leaves alone move by up to {moved:.2g}"
    return {"left_alone": count, "left_alone_moved": moved, "note": note}


def _with_notes(details: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    notes = [each["note"] for each in (details, further) if "note" in each]
    return {**details, **further, "note": "; ".join(notes)}


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _compare(
    source: ExportSource, chosen: Format, folder: Path, prompts: list[str], expected: Tensor
) -> tuple[float, float]:
    """Return the largest logit error of the export in a folder, and the allowed error."""
    error = _difference(reloaded_logits(source, chosen.load(source, folder), prompts), expected)
    stored = getattr(chosen, "EPSILON", 0.0)
    allowed = tolerance(expected, source.language_model.model.dtype, stored)
    if not error <= allowed:
        raise UserError(
            f"the export was written and loaded again, but its logits differ by {error:.3g} from the live model's "
            f"(allowed: {allowed:.3g}); it was deleted. Were the live weights changed after the edits?"
        )
    return error, allowed


@contextmanager
def beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to the target; rename it at the end of the block, or delete it after an error.

    Raises:
        UserError: The target exists and may not be replaced, or cannot be written.
    """
    if target.exists() and not overwrite:
        raise UserError(f"{str(target)!r} exists; give another folder, or overwrite it (--overwrite, overwrite=True)")
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(f"{str(target)!r} is no earlier export (it has no {MANIFEST}); it is not overwritten")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(target) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(target)!r} cannot be written: {disk_error(error)}") from error


def as_json(report: ExportReport) -> dict[str, Any]:
    """Return a report as plain data."""
    return asdict(report)
