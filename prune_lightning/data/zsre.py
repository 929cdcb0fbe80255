"""zsRE, in the schema of MEND (Mitchell et al., 2022)."""

from __future__ import annotations

from typing import Any

from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.data.probes import portability
from prune_lightning.errors import UserError, near
from prune_lightning.types import EditRequest, Probe

_NQ = "nq question: "  # names a task to the T5 models that the file was made for


class ZsRE(FileStream):
    """Question-answer edits.

    Args:
        target: ``alt`` writes the alternative answer, as in EasyEdit; ``answers`` the true one, as in MEMIT. The two
            are different tasks, and the run's configuration records which was used.
        nq_prefix: Whether to keep ``nq question:`` in front of the locality questions, as MEMIT's and EasyEdit's code
            do; their specificity is of questions with it.
        kwargs: See :class:`~prune_lightning.data.files.FileStream`.
    """

    def __init__(self, target: str = "alt", nq_prefix: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if target not in ("alt", "answers"):
            raise UserError(f"unknown data.target {target!r}: {near(target, ['alt', 'answers'])}")
        self.target, self.nq_prefix = target, nq_prefix

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into a request; the locality question gets a question mark."""
        answers = row.texts("answers")
        if not answers:
            raise UserError("`answers` is missing or empty")
        old = answers[0] if self.target == "alt" else row.optional("pred")
        subject, prompt = row.stripped("subject"), row.text("src")
        asked = row.optional("loc")
        if asked and not self.nq_prefix:
            asked = asked.removeprefix(_NQ)
        locality = (Probe(asked.rstrip("?") + "?", row.text("loc_ans"), "unrelated"),) if asked else ()
        return EditRequest(
            case_id=row.row.get("case_id", case_id),
            subject=subject,
            prompt=prompt,
            target_new=row.target("alt") if self.target == "alt" else answers[0].strip(),
            target_old=old.strip() or None if old else None,
            paraphrases=(row.text("rephrase"),) if row.optional("rephrase") else (),
            locality=locality,
            portability=portability(row),
            subject_start=row.place(subject, prompt),
        )
