"""Questions about the consequences of edits: multi-hop questions of a case, criteria of ripple effects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics import Metric

from prune_lightning.errors import one_of
from prune_lightning.evaluation.decoding import Continuation, check_room, decode
from prune_lightning.evaluation.measurement import Cases, EditingMeasurement, Measured, Stream
from prune_lightning.evaluation.wild import CONTEXTS
from prune_lightning.evaluation.wild import Question as Asked
from prune_lightning.metrics import CaseMeans
from prune_lightning.metrics.functional import contains, exact_match
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.questions import PlacedGroup, Query, Question
from prune_lightning.ranges import Count, Whole
from prune_lightning.records import read_text
from prune_lightning.text.separators import join


def _holds(answer: Continuation, query: Query) -> bool:
    return answer.finite and all(contains(answer.text, names) for names in query.answers)


def _is(answer: Continuation, query: Query) -> bool:
    return answer.finite and all(exact_match(answer.text, names) for names in query.answers)


MEASURES = {"contains": _holds, "exact_match": _is}


class ConsequenceQuestions(EditingMeasurement):
    """Scores free greedy answers to the questions of groups of edits, by kind of question.

    A group is scored once all its edits are written and as long as no later edit overwrites one of them. Its questions
    count for the case that completes it. Data without groups have no scores and cost nothing.

    An answer ``contains`` an expected one word for word, or is an ``exact_match`` of it, both after normalisation.
    Where several things are asked for, all have to be in the answer, and none is an exact match.

    Args:
        context: Form of a question: ``bare``, as an ``instruction``, or in the tokenizer's ``chat`` template.
        preface: File with a text before each question, such as demonstrations; ``None`` for none.
        stops: Texts that end an answer, besides the end token.
        max_new_tokens: Longest answer.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "edit/questions"
    title = "edits, questions about consequences"

    def __init__(
        self,
        context: str = "bare",
        preface: str | None = None,
        stops: Sequence[str] = (".", "\n"),
        max_new_tokens: Count = 30,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        super().__init__(enabled, counts)
        one_of("evaluation.questions.context", context, CONTEXTS)
        self.context = context
        self.preface = read_text(Path(preface).expanduser()) if preface and enabled else ""
        self.stops, self.max_new_tokens = tuple(stops), max_new_tokens
        self._groups: Sequence[PlacedGroup] = ()
        self._not_known: set[Query] = set()

    def prepare(self, stream: Stream) -> None:
        """Keep the groups of the stream."""
        self._groups = stream.groups

    def facts(self) -> Mapping[str, Any]:
        """Return the numbers of groups that the stream completes and does not, and of questions that do not count."""
        if not self._groups:
            return {}
        complete = [one.group for one in self._groups if one.case is not None]
        left_out = sum(not self._counts(question) for group in complete for question in group.questions)
        return {
            "groups": len(complete),
            "incomplete_groups": len(self._groups) - len(complete),
            "questions": sum(len(group.questions) for group in complete) - left_out,
            "questions_left_out": left_out,
        }

    def remarks(self) -> list[str]:
        """Return a sentence on groups that are not scored."""
        incomplete = sum(one.case is None for one in self._groups)
        text = f"{self.name}: {incomplete} groups are not scored, since the stream lacks an edit of each."
        return [text] if incomplete else []

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Find the conditions that the unedited model does not meet."""
        if self._groups:
            check_room("evaluation.questions.max_new_tokens", model, self.max_new_tokens)
        given = [g for one in self._groups if one.case in cases for q in one.group.questions for g in q.given]
        answers = self._answers(model, given)
        self._not_known = {query for query in given if not _holds(answers[query], query)}

    def _counts(self, question: Question) -> bool:
        return bool(question.queries) and not self._not_known.intersection(question.given)

    def metric(self) -> CaseMeans:
        """Return a fresh metric."""
        kinds = dict.fromkeys(question.kind for one in self._groups for question in one.group.questions)
        return CaseMeans([f"{kind}_{measure}" for kind in kinds for measure in MEASURES])

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the one job, or none if there are no questions."""
        return super().jobs(model, cases) if self._groups else {}

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Ask the questions of the groups that are complete, add their scores, and return rows with the answers."""
        assert isinstance(metric, CaseMeans)
        if not self._groups:
            return []
        written = max(cases, default=-1) + 1
        asked = [
            (one.case, question)
            for one in self._groups
            if one.case is not None and one.case in cases and (one.until is None or written < one.until)
            for question in one.group.questions
            if self._counts(question)
        ]
        answers = self._answers(model, [query for _, question in asked for query in question.queries])
        values: dict[str, list[tuple[int, bool]]] = defaultdict(list)
        for case, question in asked:
            for measure, right in MEASURES.items():
                hits = [right(answers[query], query) for query in question.queries]
                values[f"{question.kind}_{measure}"].append((case, all(hits) if question.every else any(hits)))
        for name, found in values.items():
            owner, hit = zip(*found, strict=True)
            metric.update(name, torch.tensor(hit), torch.tensor(owner))
        rows = {row["case"]: row for row in metric.rows(cases)}
        for case, question in asked:
            rows[case].setdefault("answers", []).extend(
                {"kind": question.kind, "prompt": query.prompt, "generated": answers[query].text}
                for query in question.queries
            )
        return list(rows.values())

    def _answers(self, model: LanguageModel, queries: Sequence[Query]) -> dict[Query, Continuation]:
        """Return the model's answer to each query; equal prompts are answered once."""
        prompts = list(dict.fromkeys(query.prompt for query in queries))
        encode = CONTEXTS[self.context]
        texts = [self.preface + prompt for prompt in prompts]
        ids = [encode(model, Asked(text, join(text, "").context)) for text in texts]
        found = decode(model, ids, [self.max_new_tokens] * len(ids), self.stops)
        by_prompt = dict(zip(prompts, found, strict=True))
        return {query: by_prompt[query.prompt] for query in queries}
