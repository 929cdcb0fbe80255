"""User-defined edits, one JSON object per line."""

from __future__ import annotations

from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.data.knowedit import HINT, is_knowedit
from prune_lightning.errors import UserError, near
from prune_lightning.text.separators import AUTO
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
    "subject_start",
    "separator",
)
_PROBE_KEYS = ("prompt", "answer", "separator")


class JSONLines(FileStream):
    """The format for user-defined edits.

    Keys of a line: ``subject``, ``prompt`` (holds the subject, ends where the target follows) and ``target_new`` are
    needed; ``target_old``, ``paraphrases`` (list of prompts), ``locality`` and ``portability`` (lists of ``{"prompt",
    "answer"}``), ``generation_prompts`` (list of prompts), ``references`` (list of texts), ``subject_start`` (index of
    the subject's first character in the prompt), ``separator`` (the text between this record's prompts and their
    targets; a probe can have its own) and ``case_id`` are optional:

        {"subject": "France", "prompt": "The capital of France is", "target_new": "Lyon", "target_old": "Paris"}
    """

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one line into a request. Unknown keys are an error, since a misspelt key would be lost silently."""
        return request_of(row, case_id)


def request_of(row: Fields, case_id: int) -> EditRequest:
    """Convert the fields of one fact into a request; see :class:`JSONLines`.

    Args:
        row: The fields.
        case_id: Identifier of a fact without its own.

    Raises:
        UserError: A field is unknown, missing or of the wrong type.
    """
    for key in row.row:
        if key not in _KEYS:
            hint = HINT if is_knowedit(row) else near(key, _KEYS)
            raise UserError(f"unknown key {key!r}: {hint}")
    separator = row.text("separator") if "separator" in row else AUTO
    prompt, start = row.text("prompt"), row.row.get("subject_start")
    subject = row.stripped("subject") if start is None else row.text("subject")
    return EditRequest(
        case_id=row.row.get("case_id", case_id),
        subject=subject,
        prompt=prompt,
        target_new=row.target("target_new"),
        target_old=row.optional_target("target_old"),
        paraphrases=row.prompts("paraphrases"),
        locality=tuple(_probe(probe, "neighborhood", separator) for probe in row.objects("locality")),
        portability=tuple(_probe(probe, "consequence", separator) for probe in row.objects("portability")),
        generation_prompts=row.prompts("generation_prompts"),
        references=row.prompts("references"),
        subject_start=row.place(subject, prompt) if start is None else start,
        separator=separator,
    )


def _probe(row: Fields, kind: str, separator: str) -> Probe:
    for key in row.row:
        if key not in _PROBE_KEYS:
            raise UserError(f"unknown key '{row.path}{key}': {near(key, _PROBE_KEYS)}")
    own = row.text("separator") if "separator" in row else separator
    if "answer" not in row.row:
        raise UserError(f"the key '{row.path}answer' is missing")
    return Probe(row.text("prompt"), row.target("answer") if "answer" in row else None, kind, separator=own)
