"""Records with the keys of EasyEdit's files."""

from __future__ import annotations

from prune_lightning.data.fields import Fields
from prune_lightning.data.probes import locality, portability
from prune_lightning.types import EditRequest, Probe


def easyedit_request(row: Fields, case_id: int, target_old: str | None) -> EditRequest:
    """Convert one record into a request.

    ``subject``, ``prompt`` and ``target_new`` make the edit; ``rephrase_prompt`` is a paraphrase; ``locality_prompt``
    has the answer ``locality_ground_truth``. ``locality`` and ``portability`` hold further probes by kind.

    Args:
        row: The record.
        case_id: Identifier of a record without its own.
        target_old: The old answer.
    """
    probe = row.optional("locality_prompt")
    subject, prompt = row.stripped("subject"), row.text("prompt")
    own = (Probe(probe, row.target("locality_ground_truth")),) if probe else ()
    return EditRequest(
        case_id=row.row.get("case_id", case_id),
        subject=subject,
        prompt=prompt,
        target_new=row.target("target_new"),
        target_old=target_old,
        paraphrases=(row.text("rephrase_prompt"),) if row.optional("rephrase_prompt") else (),
        locality=(*own, *locality(row)),
        portability=portability(row),
        subject_start=row.place(subject, prompt),
    )
