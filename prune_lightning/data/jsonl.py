"""Edits of one's own, one JSON object per line."""

from __future__ import annotations

from typing import Any

from prune_lightning.data.files import FileStream, listed
from prune_lightning.errors import UserError, near
from prune_lightning.types import EditRequest, Probe

_KEYS = (
    "subject",
    "prompt",
    "target_new",
    "case_id",
    "target_old",
    "paraphrases",
    "locality",
    "portability",
    "generation_prompts",
    "references",
)


class JSONLines(FileStream):
    """The documented format for edits of one's own.

    Keys of a line: ``subject``, ``prompt`` (holds the subject, ends where the target follows) and ``target_new`` are
    needed; ``target_old``, ``paraphrases`` (list of prompts), ``locality`` and ``portability`` (lists of ``{"prompt",
    "answer"}``), ``generation_prompts`` (list of prompts), ``references`` (list of texts) and ``case_id`` are optional:

        {"subject": "France", "prompt": "The capital of France is", "target_new": "Lyon", "target_old": "Paris"}
    """

    def parse(self, row: dict[str, Any], case_id: int) -> EditRequest:
        """Turn one line into a request; unknown keys are an error, since a misspelt one would be lost silently."""
        for key in row:
            if key not in _KEYS:
                raise UserError(f"unknown key {key!r}: {near(key, _KEYS)}")
        return EditRequest(
            case_id=row.get("case_id", case_id),
            subject=row["subject"],
            prompt=row["prompt"].rstrip(),
            target_new=row["target_new"].strip(),
            target_old=row["target_old"].strip() if row.get("target_old") else None,
            paraphrases=tuple(listed(row, "paraphrases")),
            locality=tuple(Probe(probe["prompt"], probe["answer"]) for probe in listed(row, "locality")),
            portability=tuple(Probe(p["prompt"], p["answer"], "consequence") for p in listed(row, "portability")),
            generation_prompts=tuple(listed(row, "generation_prompts")),
            references=tuple(listed(row, "references")),
        )
