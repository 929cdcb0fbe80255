"""Write an export, load it again, compare what it says with the live model, and only then give it its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_lightning.atomic_files import write_json
from prune_lightning.errors import UserError
from prune_lightning.export.card import write_card
from prune_lightning.export.formats import Format, format_named
from prune_lightning.export.sources import ExportSource
from prune_lightning.export.verify import next_token_logits, prompts_for, reloaded_logits, tolerance

MANIFEST = "export.json"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how exactly it says what the live model says.

    Args:
        format: ``full``, ``lora`` or ``delta``.
        folder: Where it lies.
        megabytes: Size of all files, in units of 10^6 bytes.
        prompts: Prompts on which logits were compared.
        max_logit_error: Largest difference between the reloaded model and what was to be exported.
        tolerance: The largest that is accepted.
        moved: Largest difference between the live model and its base on these prompts, to compare with.
        truncation_error: Largest difference between the live model and one with changes of the rank asked for; zero
            if none was.
        details: What the format tells, e.g. ranks.
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
        cut = f", cutting the rank moved logits by {self.truncation_error:.2g}" if self.truncation_error else ""
        return (
            f"exported {self.format}: {self.megabytes:.2f} MB in {self.folder}; reloaded, largest logit error "
            f"{self.max_logit_error:.2g} on {self.prompts} prompts (the edits moved them by {self.moved:.2g}{cut})"
        )


def export(
    source: ExportSource, target: str | Path, format_name: str, rank: int | None = None, overwrite: bool = False
) -> ExportReport:
    """Export an edited model.

    Written into a folder beside the target, loaded from there as a user would, compared on the prompts of the edits
    and a few others, and renamed. The comparison needs memory for a second copy of the model.

    Args:
        source: The edited model.
        target: The folder to write.
        format_name: ``full``, ``lora`` or ``delta``.
        rank: For ``lora`` and ``delta``: approximate each change by one of this rank at most.
        overwrite: Replace an export that lies there already.

    Raises:
        UserError: The target exists, an unknown format or useless rank, or what was written does not say what the live
            model says; nothing is left at the target then.
    """
    chosen = format_named(format_name)
    if rank is not None and (rank < 1 or format_name == "full"):
        raise UserError(f"a rank of at least 1 belongs to the formats lora and delta, but got {rank} for {format_name}")
    prompts = prompts_for(source.provenance.requests)
    live = next_token_logits(source.language_model, prompts)
    with source.in_place(changed=False):
        moved = _difference(next_token_logits(source.language_model, prompts), live)
    expected = live
    if rank is not None:
        source = source.truncated(rank)
        with source.in_place(changed=True):
            expected = next_token_logits(source.language_model, prompts)
    target = Path(target).expanduser()
    with _beside(target, overwrite) as folder:
        details = chosen.write(source, folder)
        error, allowed = _compare(source, chosen, folder, prompts, expected)
        figures = {"max_logit_error": error, "moved": moved, "truncation_error": _difference(expected, live)}
        write_card(folder, format_name, source, {**details, **figures})
        about = {"base_model": source.provenance.base_model, "weights": source.weights_metadata()}
        write_json(folder / MANIFEST, {"format": format_name, **about, **details, **figures, "tolerance": allowed})
        megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return ExportReport(
        format_name, str(target), megabytes, len(prompts), tolerance=allowed, details=details, **figures
    )


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _compare(
    source: ExportSource, chosen: Format, folder: Path, prompts: list[str], expected: Tensor
) -> tuple[float, float]:
    """Return the largest logit error of what lies in the folder, and what is allowed."""
    error = _difference(reloaded_logits(source, chosen.load(source, folder), prompts), expected)
    allowed = tolerance(expected, source.language_model.model.dtype)
    if not error <= allowed:
        raise UserError(
            f"the export was written and loaded again, but its logits differ by {error:.3g} from the live model's "
            f"(allowed: {allowed:.3g}); it was deleted. Are the live weights those that the edits have left?"
        )
    return error, allowed


@contextmanager
def _beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder beside the target, and rename it when the block ends; whatever goes wrong, it is gone."""
    if target.exists() and not overwrite:
        raise UserError(f"{str(target)!r} exists; give another folder, or overwrite=true")
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(f"{str(target)!r} is no earlier export (it has no {MANIFEST}); it is not overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, aside = (target.parent / f".{target.name}.{os.getpid()}.{word}" for word in ("partial", "replaced"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            target.rename(aside)
        folder.rename(target)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def as_json(report: ExportReport) -> dict[str, Any]:
    """Return a report as plain data."""
    return asdict(report)
