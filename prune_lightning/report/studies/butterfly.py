"""The study "The Butterfly Effect of Model Editing" (Yang et al., 2024): single edits that collapse a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prune_lightning.atomic_files import write_lines
from prune_lightning.report.groups import FinishedRun
from prune_lightning.report.studies.page import Cell, markdown
from prune_lightning.report.studies.runs import option
from prune_lightning.requests import EditRequest

_NAME = "edit/perplexity"
_MOST = 1e30  # what is not finite is drawn here


@dataclass(frozen=True)
class Edit:
    """One edit alone.

    Args:
        request: The request.
        details: What the method reports of it.
        relative: ME-PPL after it, relative to the unedited model's; ``inf`` if it is not finite.
        collapsed: Whether that counts as a collapse.
        refused: Reason of the guard that refused it, or ``None``.
    """

    request: Mapping[str, Any]
    details: Mapping[str, Any]
    relative: float
    collapsed: bool
    refused: str | None


def butterfly(runs: Sequence[FinishedRun]) -> tuple[str, Figure]:
    """Return the perplexity after each edit, and the edits that collapse the model under each guard.

    A panel per run without guards; runs with guards are rows of the table.
    """
    edits = {run.folder.name: read_edits(run) for run in runs}
    alone = [run for run in runs if not option(run, "callbacks.guards")]
    drawing = Figure(figsize=(3.9 * max(1, len(alone)), 3.6), layout="constrained")
    for axes, run in zip(drawing.subplots(1, len(alone), squeeze=False, sharey=True)[0], alone, strict=True):
        found = sorted(edits[run.folder.name], key=lambda edit: edit.relative)
        heights = [min(edit.relative, _MOST) for edit in found]
        colors = ["C3" if edit.collapsed else "C0" for edit in found]
        axes.scatter(range(1, len(found) + 1), heights, c=colors, s=12)
        factor = run.summary["measurements"][_NAME]["factor"]
        axes.axhline(factor, color="C3", lw=1, ls="--", label=f"collapse: {factor:g} times the unedited model's")
        axes.set(yscale="log", title=f"{run.summary['method']}, {_data(run)}", xlabel="edits, sorted")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    drawing.axes[0].set_ylabel("ME-PPL after the edit, relative")
    heads = [
        "editor",
        "data",
        "edits",
        "guards",
        "refused",
        "collapse",
        "largest relative ME-PPL",
        "median",
        "unedited ME-PPL",
    ]
    rows = [_row(run, edits[run.folder.name]) for run in runs]
    return f"{runs[0].summary['model']}, every edit alone:\n\n{markdown(heads, rows)}{_named(runs, edits)}", drawing


def _data(run: FinishedRun) -> str:
    """Return the data of a run; the bundled ones with the place of the subject."""
    place = {True: ", subject first", False: ", subject inside", None: ""}
    return f"{run.summary['data']}{place[option(run, 'data.subject_first')]}"


def _row(run: FinishedRun, edits: Sequence[Edit]) -> list[Cell]:
    relative = sorted(edit.relative for edit in edits)
    policy = option(run, "callbacks.guards.policy") or "none"
    refused, collapsed = sum(edit.refused is not None for edit in edits), sum(edit.collapsed for edit in edits)
    start = [str(run.summary["method"]), _data(run), len(edits), str(policy), refused, collapsed]
    return [*start, relative[-1], relative[len(relative) // 2], run.summary["measurements"][_NAME]["reference"]]


def _named(runs: Sequence[FinishedRun], edits: Mapping[str, Sequence[Edit]]) -> str:
    """Return what refused the edits under guards."""
    reasons = [edit.refused.split(":")[0] for run in runs for edit in edits[run.folder.name] if edit.refused]
    counts = ", ".join(f"{name} ({reasons.count(name)})" for name in dict.fromkeys(reasons))
    return f"\n\nRefused by: {counts}." if counts else ""


def read_edits(run: FinishedRun) -> list[Edit]:
    """Return the edits of a run with what followed them, from ``edits.jsonl`` and ``cases.jsonl``."""
    lines = [json.loads(line) for line in (run.folder / "cases.jsonl").read_text("utf-8").splitlines()]
    rows = {line["case"]: line for line in lines if line["measurement"] == _NAME and line["num_requests"]}
    found = []
    for case, text in enumerate((run.folder / "edits.jsonl").read_text("utf-8").splitlines()):
        line, row = json.loads(text), rows[case]
        relative = math.inf if row["relative"] is None else float(row["relative"])
        found.append(Edit(line["request"], line["details"], relative, bool(row["collapsed"]), line["refused"]))
    return found


def write_hard(runs: Sequence[FinishedRun], path: Path) -> int:
    """Write the edits that collapse a model in any of the runs without guards, in the format of ``data=jsonl``.

    Returns:
        Their number.
    """
    hard: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        if not option(run, "callbacks.guards"):
            for edit in read_edits(run):
                if edit.collapsed:
                    request = EditRequest.from_dict(edit.request)
                    hard.setdefault(request.fact, _line(request))
    write_lines(path, list(hard.values()))
    return len(hard)


def _line(request: EditRequest) -> dict[str, Any]:
    line: dict[str, Any] = {"case_id": request.case_id, "subject": request.subject, "prompt": request.prompt}
    line |= {"subject_start": request.subject_start, "target_new": request.target_new, "target_old": request.target_old}
    line |= {"paraphrases": list(request.paraphrases), "separator": request.separator}
    probes = [{"prompt": p.prompt, "answer": p.answer, "separator": p.separator} for p in request.locality]
    return line | {"locality": probes}
