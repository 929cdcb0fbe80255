"""What the model says after the prompts of the edits: a few generated tokens for report and trackers, not scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.measurement import Cases, EditingMeasurement
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Whole
from prune_lightning.text.separators import TextPair
from prune_lightning.types import EditRequest

_FURTHER_TOKENS = 2  # of an answer to the edit's own prompt, which may not be as long as the expected one
_LONGEST = 12


@dataclass(frozen=True)
class Question:
    """A prompt to ask the model.

    Args:
        kind: ``now``, the edit's own prompt; ``paraphrases``, or ``locality``.
        pairs: The prompt with each answer that may be expected.
        further: Tokens beyond the longest of them.
    """

    kind: str
    pairs: tuple[TextPair, ...]
    further: int = 0

    @classmethod
    def own(cls, request: EditRequest) -> Question:
        """Return the question that the prompt of an edit asks."""
        expected = (request.target_new, request.target_old)
        return cls("now", tuple(request.pair(answer) for answer in expected if answer), _FURTHER_TOKENS)

    def cut(self, text: str) -> str:
        """Return an answer up to the end of its sentence, unless a full stop is a part of what may be expected."""
        if any("." in pair.continuation.strip().rstrip(".") for pair in self.pairs):
            return text.strip()
        return text.partition(".")[0].strip()


class _NoScores(Metric):
    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> dict[str, Tensor]:
        """Return no scores."""
        return {}


class Answers(EditingMeasurement):
    """Greedy answers to an edit's prompt, to its first paraphrases and to its first locality prompts.

    Rows have ``now``, ``paraphrases`` and ``locality``. The answer to a paraphrase or to a locality prompt is as long
    as the expected one, in tokens. The cost is about that of scoring the edits once. The unedited model is only asked
    what the edits do not give as ``target_old``.

    Args:
        max_probes: Largest number of paraphrases, and of locality prompts, of each edit.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "answers"

    def __init__(self, max_probes: Whole = 1, enabled: bool = True, counts: Sequence[Whole] | None = ()) -> None:
        super().__init__(enabled, counts)
        self.max_probes = max_probes
        self._unedited = False

    def metric(self) -> Metric:
        """Return a metric without scores."""
        return _NoScores()

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Note that the next answers are those of the unedited model."""
        self._unedited = True

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Ask, and return the answers of each case."""
        metric.update()
        unedited, self._unedited = self._unedited, False
        asked = [(i, q) for i, request in cases.items() for q in (self._unknown if unedited else self._all)(request)]
        rows: dict[int, dict[str, Any]] = {
            i: {"case": i, "now": None, "paraphrases": [], "locality": []} for i in cases
        }
        for (i, question), text in zip(asked, ask(model, [question for _, question in asked]), strict=True):
            if question.kind == "now":
                rows[i]["now"] = text
            else:
                rows[i][question.kind].append(text)
        return list(rows.values())

    def _all(self, request: EditRequest) -> list[Question]:
        probes = [probe.pair() for probe in request.locality if probe.answer]
        kinds = {"paraphrases": request.paraphrase_pairs(), "locality": probes}
        return [Question.own(request)] + [
            Question(kind, (pair,)) for kind, pairs in kinds.items() for pair in pairs[: self.max_probes]
        ]

    def _unknown(self, request: EditRequest) -> list[Question]:
        return [] if request.target_old else [Question.own(request)]


def ask(model: LanguageModel, questions: Sequence[Question]) -> list[str]:
    """Return the greedy answer to each question; empty where the logits are not finite.

    Args:
        model: The model, as it is.
        questions: What to ask. Equal ones are asked once.
    """
    if not questions:
        return []
    encoded = iter(model.tokens.encode_pairs([pair for question in questions for pair in question.pairs]))
    most = min(_LONGEST, model.tokens.max_length - 1)
    limits = [min(max(len(next(encoded).target) for _ in q.pairs) + q.further, most) for q in questions]
    asked = [(q.pairs[0].context, limit) for q, limit in zip(questions, limits, strict=True)]
    unique = list(dict.fromkeys(asked))
    prompts = model.tokens.encode_all([text for text, _ in unique])
    found = dict(zip(unique, decode(model, prompts, [limit for _, limit in unique], stops=["\n"]), strict=True))
    texts = [found[question].text if found[question].finite else "" for question in asked]
    return [question.cut(text) for question, text in zip(questions, texts, strict=True)]
