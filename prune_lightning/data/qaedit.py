"""QAEdit, the questions of "The Mirage of Model Editing" (Yang et al., 2025, https://arxiv.org/abs/2502.11177)."""

from __future__ import annotations

from typing import Any

from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.ranges import Count
from prune_lightning.types import EditRequest, Probe


class QAEdit(FileStream):
    """Questions of Natural Questions, TriviaQA and SimpleQA with their true answers.

    ``prompt``, ``target`` and ``subject`` make the edit; ``rephrase`` is a paraphrase; ``locality`` holds unrelated
    questions ``loc`` with their answers ``loc_ans``. There is no old answer. Targets stay as they are, also with marks
    such as ``Wilt Chamberlain *``.

    Args:
        probes: Use only the first locality questions of a record; ``None`` for all five. The paper's code uses one.
        kwargs: See :class:`~prune_lightning.data.files.FileStream`.
    """

    def __init__(self, path: str, probes: Count | None = None, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        self.probes = probes

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into a request."""
        subject, prompt = row.stripped("subject"), row.text("prompt")
        asked = row.objects("locality")[: self.probes]
        return EditRequest(
            case_id=row.row.get("id", case_id),
            subject=subject,
            prompt=prompt,
            target_new=row.target("target"),
            paraphrases=(row.text("rephrase"),) if row.optional("rephrase") else (),
            locality=tuple(Probe(probe.text("loc"), probe.target("loc_ans"), "unrelated") for probe in asked),
            subject_start=row.place(subject, prompt),
        )
