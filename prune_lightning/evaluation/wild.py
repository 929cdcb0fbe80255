"""WILD: free generation of answers by an edited model, without teacher forcing (Yang et al., 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

from prune_lightning.errors import UserError, one_of
from prune_lightning.evaluation.decoding import Continuation, check_room, decode
from prune_lightning.evaluation.judging import Judge, judge_prompt, verdict
from prune_lightning.evaluation.measurement import Cases, Headline
from prune_lightning.evaluation.prompts import SampledMeasurement, comparable
from prune_lightning.metrics import CaseMeans
from prune_lightning.metrics.functional import contains, exact_match
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole
from prune_lightning.types import EditRequest, Probe

INSTRUCTION = "Please answer the question:\n\nQ: {}\nA:"


@dataclass(frozen=True)
class Question:
    """A prompt to be answered.

    Args:
        prompt: Its text.
        literal: The text up to the answer as in editing, including separator and chat template.
    """

    prompt: str
    literal: str


Encoder = Callable[[LanguageModel, Question], list[int]]


def _chat(model: LanguageModel, question: Question) -> list[int]:
    head, tail = model.tokens.chat_frame()
    text = head + question.prompt.rstrip() + tail
    ids: list[int] = model.tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


CONTEXTS: dict[str, Encoder] = {
    "bare": lambda model, question: model.tokens.encode(question.literal),
    "instruction": lambda model, question: model.tokens.encode(INSTRUCTION.format(question.prompt.rstrip())),
    "chat": _chat,
}
KINDS = ("efficacy", "generalization", "portability")


def questions(request: EditRequest, kind: str) -> list[tuple[Question, tuple[str, ...]]]:
    """Return a request's questions of one kind, each with its correct answers."""
    if kind == "portability":
        return [(_asked(probe), (probe.answer, *probe.aliases)) for probe in request.portability if probe.answer]
    if kind == "efficacy":
        return [(Question(request.prompt, request.pair().context), (request.target_new,))]
    pairs = zip(request.paraphrases, request.paraphrase_pairs(), strict=True)
    return [(Question(prompt, pair.context), (request.target_new,)) for prompt, pair in pairs]


def _asked(probe: Probe) -> Question:
    return Question(probe.prompt, probe.pair().context)


class WildGeneration(SampledMeasurement):
    """Scores free greedy answers by exact match, containment and a judge, and whether other answers changed.

    The model gets neither the target's tokens nor its length. Locality is 1 if the generated ids equal those of the
    unedited model.

    Args:
        contexts: Forms of a question: ``bare``, as an ``instruction``, or in the tokenizer's ``chat`` template.
        stops: Texts that end an answer, besides the end token. The full stop also ends "St. Louis" and "3.5"; without
            it an answer ends with its line.
        max_new_tokens: Longest answer.
        judge: Takes a list of prompts and returns a language model's replies; see :func:`judge_prompt`.
        max_cases: See :class:`SampledMeasurement`.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "edit/wild"
    title = "edits, generated answers (WILD)"
    labels: ClassVar[Mapping[str, str]] = {
        **{
            f"{context}_{kind}_{form}": f"{context}: {kind}, {name}"
            for context in CONTEXTS
            for kind in KINDS
            for form, name in (("exact_match", "exact match"), ("contains", "contained"), ("judge", "judged"))
        },
        **{f"{context}_locality": f"{context}: locality, unchanged answers" for context in CONTEXTS},
        "num_nonfinite": "answers that are not finite",
        "num_unparsable": "replies of the judge without a verdict",
    }
    headlines: ClassVar[Mapping[str, Headline]] = {
        "efficacy": Headline("bare_efficacy_exact_match", "The generated answer is the new one."),
        "generalization": Headline("bare_generalization_exact_match", "The same, after paraphrases."),
        "locality": Headline("bare_locality", "The answers to unrelated prompts have not changed."),
    }
    short: ClassVar[Sequence[str]] = ("bare_efficacy_judge", "bare_portability_exact_match")

    def __init__(
        self,
        contexts: Sequence[str] = ("bare", "instruction", "chat"),
        stops: Sequence[str] = (".", "\n"),
        max_new_tokens: Count = 50,
        judge: Judge | None = None,
        max_cases: Count | None = None,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        super().__init__(max_cases, enabled, counts)
        for context in contexts:
            one_of("context of edit/wild", context, CONTEXTS)
        self.contexts, self.stops, self.max_new_tokens, self.judge = tuple(contexts), stops, max_new_tokens, judge
        self._reference: dict[tuple[str, Question], Continuation] = {}

    def metric(self) -> CaseMeans:
        """Return a fresh metric."""
        measures = ("exact_match", "contains", *(["judge"] if self.judge else []))
        names = [f"{c}_{kind}_{measure}" for c in self.contexts for kind in KINDS for measure in measures]
        counts = ["num_nonfinite", *(["num_unparsable"] if self.judge else [])]
        return CaseMeans([*names, *(f"{context}_locality" for context in self.contexts)], counts)

    def check(self, model: LanguageModel, requests: Sequence[EditRequest]) -> None:
        """Check that the answers fit the model's context."""
        check_room("evaluation.wild.max_new_tokens", model, self.max_new_tokens)

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Keep the unedited model's answers to the locality questions."""
        super().take_reference(model, cases)
        self._settle_contexts(model)
        self._reference = {}
        for group in comparable(model, self.chosen(cases)):
            asked = self._locality_questions(group)
            answers = self._answers(model, [(context, question) for context, _, question in asked])
            self._reference |= {(c, q): answer for (c, _, q), answer in zip(asked, answers, strict=True)}

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Generate answers, add their scores to the metric, and return rows with the raw answers."""
        assert isinstance(metric, CaseMeans)
        self._settle_contexts(model)
        cases = self.chosen(cases)
        generations = self._score_answers(metric, model, cases)
        for group in comparable(model, cases):
            generations += self._score_locality(metric, model, group)
        rows: dict[int, dict[str, Any]] = {row["case"]: {**row, "generations": []} for row in metric.rows(cases)}
        for case, generation in generations:
            rows[case]["generations"].append(generation)
        return list(rows.values())

    def _settle_contexts(self, model: LanguageModel) -> None:
        if "chat" in self.contexts and not model.tokens.tokenizer.chat_template:
            rank_zero_warn("edit/wild: the tokenizer has no chat template; the context `chat` is left out")
            self.contexts = tuple(context for context in self.contexts if context != "chat")

    def _answers(self, model: LanguageModel, asked: Sequence[tuple[str, Question]]) -> list[Continuation]:
        """Return the model's answers to ``(context, question)``; equal questions are answered once."""
        unique = list(dict.fromkeys(asked))
        prompts = [CONTEXTS[context](model, question) for context, question in unique]
        answers = decode(model, prompts, [self.max_new_tokens] * len(prompts), self.stops)
        by_question = dict(zip(unique, answers, strict=True))
        return [by_question[question] for question in asked]

    def _locality_questions(self, cases: Cases) -> list[tuple[str, int, Question]]:
        return [(c, i, _asked(probe)) for c in self.contexts for i, r in cases.items() for probe in r.locality]

    def _score_locality(
        self, metric: CaseMeans, model: LanguageModel, cases: Cases
    ) -> list[tuple[int, dict[str, Any]]]:
        asked = self._locality_questions(cases)
        answers = self._answers(model, [(context, question) for context, _, question in asked])
        generations, same = [], []
        for (context, case, question), answer in zip(asked, answers, strict=True):
            if (before := self._reference.get((context, question))) is None:
                raise UserError("edit/wild compares with the unedited model: call take_reference on it first")
            same.append(answer.finite and before.finite and answer.ids == before.ids)
            row = {"context": context, "kind": "locality", "prompt": question.prompt, "generated": answer.text}
            generations.append((case, {**row, "generated_before": before.text}))
        for context in self.contexts:
            here = [i for i, (c, _, _) in enumerate(asked) if c == context]
            cases_of = torch.tensor([asked[i][1] for i in here], dtype=torch.long)
            metric.update(f"{context}_locality", torch.tensor([same[i] for i in here]), cases_of)
        return generations

    def _score_answers(self, metric: CaseMeans, model: LanguageModel, cases: Cases) -> list[tuple[int, dict[str, Any]]]:
        asked = [
            (context, kind, case, question, gold)
            for context in self.contexts
            for kind in KINDS
            for case, request in cases.items()
            for question, gold in questions(request, kind)
        ]
        answers = self._answers(model, [(context, question) for context, _, _, question, _ in asked])
        values: dict[str, list[bool]] = {
            "exact_match": [a.finite and exact_match(a.text, q[-1]) for a, q in zip(answers, asked, strict=True)],
            "contains": [a.finite and contains(a.text, q[-1]) for a, q in zip(answers, asked, strict=True)],
        }
        replies: list[str] = [""] * len(asked)
        if self.judge:
            replies = self._replies([(q[3].prompt, q[4][0], a.text) for a, q in zip(answers, asked, strict=True)])
            values["judge"] = [a.finite and verdict(reply) is True for a, reply in zip(answers, replies, strict=True)]
        for context in self.contexts:
            for kind in KINDS:
                here = [i for i, q in enumerate(asked) if q[:2] == (context, kind)]
                cases_of = torch.tensor([asked[i][2] for i in here], dtype=torch.long)
                for measure, found in values.items():
                    metric.update(f"{context}_{kind}_{measure}", torch.tensor([found[i] for i in here]), cases_of)
        cases_of = torch.tensor([q[2] for q in asked], dtype=torch.long)
        metric.update("num_nonfinite", torch.tensor([not answer.finite for answer in answers]), cases_of)
        if self.judge:
            metric.update("num_unparsable", torch.tensor([verdict(reply) is None for reply in replies]), cases_of)
        return [
            (
                case,
                {"context": context, "kind": kind, "prompt": question.prompt}
                | {"answers": list(gold), "generated": answer.text}
                | ({"reply": reply} if self.judge else {}),
            )
            for (context, kind, case, question, gold), answer, reply in zip(asked, answers, replies, strict=True)
        ]

    def _replies(self, items: Sequence[tuple[str, str, str]]) -> list[str]:
        assert self.judge is not None
        replies = list(self.judge([judge_prompt(*item) for item in items]))
        if len(replies) != len(items):
            raise UserError(f"the judge of edit/wild gave {len(replies)} replies to {len(items)} prompts")
        return replies
