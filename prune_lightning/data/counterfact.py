"""CounterFact, in its original schema (Meng et al., 2022) and in EasyEdit's."""

from __future__ import annotations

from itertools import pairwise

from prune_lightning.data.easyedit import easyedit_request
from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.errors import shown
from prune_lightning.text.scripts import is_word
from prune_lightning.types import EditRequest, Probe


class CounterFact(FileStream):
    """Counterfactual edits; records with ``requested_rewrite`` have the original schema, others EasyEdit's.

    In the original prompts ``{}`` stands for the subject.
    """

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into a request."""
        if "requested_rewrite" in row.row:
            return self._original(row, case_id)
        return easyedit_request(row, case_id, row.target("ground_truth"))

    def _original(self, row: Fields, case_id: int) -> EditRequest:
        rewrite = row.object("requested_rewrite")
        old = rewrite.object("target_true").target("str")
        subject, template = rewrite.stripped("subject"), rewrite.text("prompt")
        prompt, place = filled(row, template, rewrite.text("subject"))
        return EditRequest(
            case_id=row.row.get("case_id", case_id),
            subject=subject,
            prompt=prompt,
            target_new=rewrite.object("target_new").target("str"),
            target_old=old,
            paraphrases=row.prompts("paraphrase_prompts"),
            locality=tuple(Probe(prompt, old) for prompt in row.prompts("neighborhood_prompts")),
            generation_prompts=row.prompts("generation_prompts"),
            subject_start=row.place(subject, prompt) if place is None else place,
        )


def filled(row: Fields, template: str, subject: str) -> tuple[str, int | None]:
    """Return a template with the subject in place of ``{}``, and the subject's position; ``None`` without ``{}``.

    Several ``{}`` give a remark; the first one is edited.
    """
    prompt, place = _filled(template, subject), template.find("{}")
    if template.count("{}") > 1:
        row.notes.append(f"{{}} stands {template.count('{}')} times in {shown(template)}; the first one is edited")
    return prompt, prompt.index(subject.strip(), place) if place >= 0 else None


def _filled(template: str, subject: str) -> str:
    """Return a template with the subject in place of ``{}``; blanks around the subject stay where words would join."""
    kept = subject.strip()
    parts = template.split("{}")
    filled = parts[0]
    for before, after in pairwise(parts):
        left = subject[: subject.index(kept)] if is_word(before[-1:] or " ") else ""
        right = subject[subject.index(kept) + len(kept) :] if is_word(after[:1] or " ") else ""
        filled += left + kept + right + after
    return filled
