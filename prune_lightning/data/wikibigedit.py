"""WikiBigEdit (Thede et al., 2025, https://arxiv.org/abs/2503.05683), as on the hub and with EasyEdit's keys."""

from __future__ import annotations

from prune_lightning.data.easyedit import easyedit_request
from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.types import EditRequest, Probe


class WikiBigEdit(FileStream):
    """Changes of Wikidata as questions; records with ``update`` have the schema of the hub, others EasyEdit's keys.

    On the hub ``update`` is the question and ``ans`` its new answer. ``rephrase`` is a paraphrase. ``personas`` (the
    question in the words of a role) has the same answer and becomes a portability probe, as does the question over two
    facts ``mhop`` with its answer ``mhop_ans``. ``loc`` and ``loc_ans`` are an unrelated question.
    """

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into a request."""
        if "update" not in row:
            return easyedit_request(row, case_id, row.optional_target("ground_truth"))
        subject, prompt, target = row.stripped("subject"), row.text("update"), row.target("ans")
        asked, hop, unrelated = row.optional("personas"), row.optional("mhop"), row.optional("loc")
        return EditRequest(
            case_id=case_id,
            subject=subject,
            prompt=prompt,
            target_new=target,
            paraphrases=(row.text("rephrase"),) if row.optional("rephrase") else (),
            locality=(Probe(unrelated, row.target("loc_ans"), "unrelated"),) if unrelated else (),
            portability=(
                *((Probe(asked, target, "personas"),) if asked else ()),
                *((Probe(hop, row.target("mhop_ans"), "multi_hop"),) if hop else ()),
            ),
            subject_start=row.place(subject, prompt),
        )
