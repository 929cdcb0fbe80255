"""Scores edits along a stream: just before and just after they are written, and again later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.evaluation.counterfact import pairs_by_kind
from prune_lightning.evaluation.measurement import Cases, Headline, Measured
from prune_lightning.evaluation.pair_scores import NOTHING
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.metrics import RetentionMatrix
from prune_lightning.metrics.functional import preference
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.text.separators import TextPair
from prune_lightning.types import EditRequest, Probe

FORMS = ("score", "accuracy")
_PROBES_PER_PASS = 32
_FORM_NAMES = {"score": "success", "accuracy": "exact match"}
_LABELS = {
    "acquisition": "right after the edit",
    "final": "all edits so far",
    "forgetting": "forgetting",
    "forgetting_max": "forgetting since the best",
    "bwt": "backward transfer",
    "fwt": "forward transfer",
    "half_life": "half-life in edits",
    "num_nonfinite": "non-finite scores",
}


@dataclass(frozen=True)
class Success:
    """The success of requests, 1 or 0; NaN where the model's scores are not finite.

    Args:
        score: Whether the new target is likelier than the old one; ``None`` if the old one is not known.
        accuracy: Whether every token of the new target is the first choice.
    """

    score: list[float | None]
    accuracy: list[float]

    def as_dict(self, i: int) -> dict[str, Any]:
        """Return the success of one request as plain data; non-finite scores are failures."""
        score = self.score[i]
        return {"score": None if score is None else score == 1.0, "accuracy": self.accuracy[i] == 1.0}


def success(model: LanguageModel, requests: Sequence[EditRequest]) -> Success:
    """Score the edited prompts of requests."""
    both = [pairs_by_kind(request, "efficacy")[0] for request in requests]
    known = [i for i, (_, old) in enumerate(both) if old]
    found = score_pairs(model, [new for new, _ in both] + [old for _, old in both if old])
    new, old = found.nll[: len(both)], found.nll[len(both) :]
    accuracy = torch.where(torch.isfinite(new), found.hit[: len(both)].float(), torch.nan)
    compared = preference(new[known], old)
    compared = torch.where(torch.isfinite(new[known]) & torch.isfinite(old), compared, torch.nan)
    score: list[float | None] = [None] * len(requests)
    for i, value in zip(known, compared.tolist(), strict=True):
        score[i] = value
    return Success(score, accuracy.tolist())


class UnrelatedAnswers:
    r"""The unedited model's answers to unrelated probes, and whether a later model gives the same.

    :math:`L(t) = \mathrm{mean}_j 1[\mathrm{out}_t(x_j) = \mathrm{out}_0(x_j)]`. The output for a probe is the model's
    first choices at the positions of the probe's answer under teacher forcing (EasyEdit's locality), or the first
    choice after the prompt if the probe has no answer. Probes and dtype are the same each time, and so are the batches
    in half precision, where a first choice can depend on the other rows.

    Args:
        model: The unedited model.
        probes: The probes; duplicates count once.
    """

    def __init__(self, model: LanguageModel, probes: Sequence[Probe]) -> None:
        self._pairs: list[TextPair] = []
        self._rows: list[tuple[list[int], int]] = []  # ids, and the position before the first token of the answer
        single = torch.finfo(model.model.dtype).bits >= 32
        for probe in dict.fromkeys(probes):
            if probe.answer and single:
                self._pairs.append(probe.pair())
            elif probe.answer:
                (pair,) = model.tokens.encode_pairs([probe.pair()])
                self._rows.append((pair.ids[:-1], pair.target_start - 1))
            else:
                ids = model.tokens.encode(probe.pair().context)[-model.tokens.max_length :]
                self._rows.append((ids, len(ids) - 1))
        self._rows.sort(key=lambda row: len(row[0]))
        self._before = self._outputs(model)

    def unchanged(self, model: LanguageModel) -> list[bool]:
        """Return whether each probe's output is unchanged; non-finite scores count as changed."""
        now = self._outputs(model)
        return [a is not None and a == b for a, b in zip(now, self._before, strict=True)]

    @torch.no_grad()
    def _outputs(self, model: LanguageModel) -> list[list[int] | None]:
        scores = score_pairs(model, self._pairs)
        answered = zip(scores.predicted.tolist(), scores.num_tokens.tolist(), strict=True)
        outputs: list[list[int] | None] = [None if NOTHING in row[:n] else row[:n] for row, n in answered]
        with model.frozen_mode():
            for start in range(0, len(self._rows), _PROBES_PER_PASS):
                asked = model.asked([(ids, first + 1) for ids, first in self._rows[start : start + _PROBES_PER_PASS]])
                rows = [(ids, prompt - 1) for ids, prompt in asked]
                ids, mask = model.tokens.pad([row for row, _ in rows], model.device)
                lengths = [len(row) - first for row, first in rows]
                owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
                where = torch.tensor([place for row, first in rows for place in range(first, len(row))])
                with model.prompts([first + 1 for _, first in rows]):
                    logits = model.logits_at(ids, mask, owner.to(model.device), where.to(model.device))
                finite = torch.isfinite(logits).all(-1).split(lengths)
                choices = logits.argmax(-1).split(lengths)
                outputs += [c.tolist() if f.all() else None for c, f in zip(choices, finite, strict=True)]
        return outputs


class StreamScores:
    """Collects the success of edits over a stream, as SCORE and as ACCURACY, and the agreement on unrelated answers.

    Every process scores everything, so nothing is gathered.

    Args:
        superseded: See :class:`~prune_lightning.metrics.RetentionMatrix`.

    Attributes:
        matrices: The retention matrix of each form.
    """

    name = "stream"
    title = "stream"
    labels: ClassVar[Mapping[str, str]] = {
        **{f"{form}/{key}": f"{text}, {name}" for form, name in _FORM_NAMES.items() for key, text in _LABELS.items()},
        "locality_agreement": "locality, agreement with the unedited model",
    }
    headlines: ClassVar[Mapping[str, Headline]] = {
        "efficacy": Headline("accuracy/final", "The new answer is what the model says."),
        "locality": Headline(
            "locality_agreement", "The first choices after unrelated prompts are the unedited model's."
        ),
    }
    short: ClassVar[Sequence[str]] = ("score/acquisition", "score/forgetting", "locality_agreement")
    lower: ClassVar[frozenset[str]] = frozenset(
        f"{form}/{key}" for form in _FORM_NAMES for key in ("forgetting", "forgetting_max")
    )
    tasks: ClassVar[Mapping[str, float]] = {}

    def __init__(self, superseded: Mapping[int, int] | None = None) -> None:
        self.matrices = {form: RetentionMatrix(superseded, sync_on_compute=False) for form in FORMS}
        self.unrelated: UnrelatedAnswers | None = None
        self._commits: Sequence[int] = ()
        self._immediate: dict[int, dict[str, float]] = {}
        self._fresh: list[dict[str, Any]] = []

    def begin(
        self, model: LanguageModel, cases: Cases, commits: Sequence[int], unrelated: Sequence[Probe]
    ) -> list[dict[str, Any]]:
        """Score the unedited model.

        Args:
            model: The unedited model.
            cases: The cases that will be scored later.
            commits: Edit count at which each case of the stream is written.
            unrelated: Probes that no edit concerns.

        Returns:
            The rows of the unedited model.
        """
        self._commits = commits
        self.unrelated = UnrelatedAnswers(model, unrelated)
        rows = self._add(0, list(cases), success(model, list(cases.values())))
        self._fresh = []
        return [{"case": i, **_final(row)} for i, row in rows.items()]

    def just_before(self, cases: Sequence[int], num_requests: int, found: Success) -> None:
        """Add the scores of cases just before they are written; those of the unedited model are known."""
        if num_requests:
            self._add(num_requests, cases, found)

    def just_after(self, cases: Sequence[int], num_requests: int, found: Success) -> None:
        """Add the scores of cases that have just been written."""
        self._add(num_requests, cases, found)

    def score(self, model: LanguageModel, cases: Cases, num_requests: int, weights: Mapping[int, float]) -> Measured:
        """Score cases written so far; those that have just been written are not scored again.

        Args:
            model: The edited model.
            cases: The cases to score.
            num_requests: Edits written so far.
            weights: Number of cases that each of them represents.

        Returns:
            Figures of the stream so far, and the rows whose means are ``final`` and ``locality_agreement``.
        """
        assert self.unrelated is not None
        older = [i for i in cases if self._commits[i] < num_requests]
        rows = {i: self._immediate[i] for i in cases if self._commits[i] == num_requests}
        if older:
            rows |= self._add(num_requests, older, success(model, [cases[i] for i in older]))
        table: list[dict[str, Any]] = [{"case": i, **_final(rows[i])} for i in sorted(rows)]
        table = [row if weights[row["case"]] == 1 else {**row, "weight": weights[row["case"]]} for row in table]
        scores = {f"{form}/{key}": value for form in FORMS for key, value in self.figures(form).items()}
        if same := [float(value) for value in self.unrelated.unchanged(model)]:
            scores["locality_agreement"] = sum(same) / len(same)
            table += [{"case": j, "task": "unrelated", "locality_agreement": value} for j, value in enumerate(same)]
        return Measured(scores, table)

    def drop(self, num_requests: int) -> None:
        """Remove what :meth:`score` added at a count, before it is called again there."""
        for matrix in self.matrices.values():
            matrix.drop(num_requests)

    def figures(self, form: str) -> dict[str, float]:
        """Return the figures of one form so far; none if no case has it."""
        matrix = self.matrices[form]
        return {key: float(value) for key, value in matrix.compute().items()} if matrix.update_called else {}

    def details(self) -> dict[str, Any]:
        """Return retention, conditional retention and BWT by age."""
        return {
            form: {"by_age": [asdict(row) for row in matrix.by_age()]}
            for form, matrix in self.matrices.items()
            if matrix.update_called
        }

    def fresh(self) -> list[dict[str, Any]]:
        """Return, as plain data, the scores added since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def restore(self, scores: Sequence[Mapping[str, Any]], again: bool = False) -> None:
        """Add the scores that :meth:`fresh` returned in an earlier run; non-finite ones are failures.

        Args:
            scores: The scores.
            again: Whether :meth:`fresh` is to return them again.
        """
        for found in scores:
            score = [None if value is None else float(value) for value in found["score"]]
            accuracy = [math.nan if value is None else float(value) for value in found["accuracy"]]
            self._add(found["num_requests"], found["cases"], Success(score, accuracy))
        if not again:
            self._fresh = []

    def _add(self, num_requests: int, cases: Sequence[int], found: Success) -> dict[int, dict[str, float]]:
        # In JSON, NaN becomes null, which stands for a score that is not known.
        plain = {form: ["nan" if value != value else value for value in values] for form, values in vars(found).items()}
        self._fresh.append({"num_requests": num_requests, "cases": list(cases), **plain})
        rows: dict[int, dict[str, float]] = {i: {} for i in cases}
        given: Mapping[str, Sequence[float | None]] = {"score": found.score, "accuracy": found.accuracy}
        for form, values in given.items():
            known = [(i, value) for i, value in zip(cases, values, strict=True) if value is not None]
            for i, value in known:
                rows[i][form] = value
            if known:
                index, value_ = torch.tensor(known).unbind(1)
                commit = torch.tensor([self._commits[i] for i, _ in known])
                self.matrices[form].update(num_requests, commit, index, value_)
        self._immediate = {i: rows[i] for i in cases if self._commits[i] == num_requests} or self._immediate
        return rows


def _final(row: Mapping[str, float]) -> dict[str, float]:
    return {f"{form}/final": value for form, value in row.items()}


def entries(matrix: RetentionMatrix) -> list[tuple[int, int, int, float]]:
    """Return the entries of a matrix: count, commit, case, value."""
    seen = matrix.observations()
    columns: list[Tensor] = [seen.time, seen.commit, seen.case]
    rows = zip(*(column.long().tolist() for column in columns), seen.value.tolist(), strict=True)
    return [(t, c, i, value) for t, c, i, value in rows]
