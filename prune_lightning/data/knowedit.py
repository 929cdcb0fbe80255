"""KnowEdit (Zhang et al., 2024, https://arxiv.org/abs/2401.01286), in the format of its files on the hub."""

from __future__ import annotations

from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.data.probes import locality, portability
from prune_lightning.errors import UserError
from prune_lightning.types import EditRequest

HINT = "this looks like a record of KnowEdit: use data=knowedit"


def is_knowedit(row: Fields) -> bool:
    """Whether a record has KnowEdit's nested probes."""
    return any(isinstance(row.row.get(key), dict) for key in ("locality", "portability")) and (
        "ground_truth" in row.row or "concept" in row.row
    )


class KnowEdit(FileStream):
    """WikiData_recent, WikiData_counterfact, ZsRE and WikiBio of KnowEdit.

    ``subject`` (WikiBio: ``concept``), ``prompt`` (``text``) and ``target_new`` (``labels``) make the edit;
    ``ground_truth``, if present, is the old target; ``rephrase_prompt`` or ``rephrase`` are paraphrases. The
    probes of ``locality`` and ``portability`` keep their kinds, e.g. ``Relation_Specificity``. Answers are texts or
    nested lists: the first one counts, the others are its aliases.
    """

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into a request."""
        subject = row.stripped("concept" if "concept" in row and "subject" not in row else "subject")
        prompt = row.text("text" if "text" in row and "prompt" not in row else "prompt")
        target = "labels" if "labels" in row and "target_new" not in row else "target_new"
        new, old = row.answers(target), row.answers("ground_truth")
        if not new:
            raise UserError(f"`{target}` is missing or empty")
        if len(new) > 1:
            row.notes.append(f"`{target}` has {len(new)} answers; the first one is written")
        return EditRequest(
            case_id=row.row.get("case_id", case_id),
            subject=subject,
            prompt=prompt,
            target_new=new[0],
            target_old=old[0] if old else None,
            paraphrases=tuple(text for key in ("rephrase_prompt", "rephrase") for text in row.answers(key)),
            locality=locality(row),
            portability=portability(row),
            subject_start=row.place(subject, prompt),
        )
