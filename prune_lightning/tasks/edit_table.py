"""The edits of a run as a table: what was asked, the answers before and after, and what became of each edit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from prune_lightning.evaluation.answers import Question, ask
from prune_lightning.methods.base import EditingModule
from prune_lightning.report.tracker import Tracker
from prune_lightning.types import EditRequest

COLUMNS = (
    "edit",
    "subject",
    "prompt",
    "old answer",
    "new answer",
    "answer before",
    "answer after all edits",
    "exact match right after the edit",
    "outcome",
)


def edit_rows(module: EditingModule, edits: Path, loggers: Sequence[Logger], from_base: bool) -> list[list[Any]]:
    """Return rows for :data:`COLUMNS`; the answers are those of :mod:`prune_lightning.evaluation.answers`.

    Args:
        module: The module, after its last edit.
        edits: The run's `edits.jsonl`.
        loggers: Those that are trackers say how many rows they take; without one there are none.
        from_base: Whether every step began with the unedited model, so that no model holds all edits.
    """
    most = max((logger.max_edits for logger in loggers if isinstance(logger, Tracker)), default=0)
    lines = [json.loads(line) for line in edits.read_text("utf-8").splitlines()] if most else []
    if not lines:
        return []
    count = min(most, len(lines))
    lines = [lines[place * len(lines) // count] for place in range(count)]
    requests = [EditRequest.from_dict(line["request"]) for line in lines]
    questions = [Question.own(request) for request in requests]
    with module.unedited():
        before: list[str | None] = [*ask(module.language_model, questions)]
    after: list[str | None] = [None] * count
    if not from_base:
        with module.run.evaluation_view():
            after = [*ask(module.language_model, questions)]
    return [
        [
            line["num_requests"],
            request.subject,
            request.prompt,
            request.target_old,
            request.target_new,
            *said,
            line["after"]["accuracy"],
            "written" if line["applied"] else f"refused: {line['refused']}",
        ]
        for line, request, *said in zip(lines, requests, before, after, strict=True)
    ]
