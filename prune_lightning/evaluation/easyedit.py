"""The scores of EasyEdit's tables: token match under teacher forcing, locality against the unedited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torchmetrics import Metric

from prune_lightning.errors import UserError
from prune_lightning.evaluation.measurement import Cases, Headline
from prune_lightning.evaluation.pair_scores import PairScores
from prune_lightning.evaluation.prompts import (
    SampledMeasurement,
    comparable,
    edit_pair,
    locality_pairs,
    paraphrase_pairs,
    portability_pairs,
    score_kinds,
)
from prune_lightning.metrics import TokenMatch
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole


class EasyEditScores(SampledMeasurement):
    """Token match ratio of rewrite, rephrase and portability prompts; agreement with the unedited model elsewhere.

    For locality only the positions of the true answer matter. The score is whether the edited model's first choices
    there are those of the unedited model.

    Args:
        max_cases: See :class:`SampledMeasurement`.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "edit/easyedit"
    title = "edits, EasyEdit"
    labels: ClassVar[Mapping[str, str]] = {
        "rewrite_acc": "rewrite, token accuracy",
        "rephrase_acc": "rephrase, token accuracy",
        "portability_acc": "portability, token accuracy",
        "locality_acc": "locality, token accuracy",
        "num_nonfinite": "scores that are not finite",
    }
    headlines: ClassVar[Mapping[str, Headline]] = {
        "efficacy": Headline("rewrite_acc", "Each token of the new answer is the model's first choice."),
        "generalization": Headline("rephrase_acc", "The same, after paraphrases of the prompt."),
        "locality": Headline("locality_acc", "The first choices after unrelated prompts are the unedited model's."),
    }
    short: ClassVar[Sequence[str]] = ("portability_acc",)

    def __init__(
        self, max_cases: Count | None = None, enabled: bool = True, counts: Sequence[Whole] | None = None
    ) -> None:
        super().__init__(max_cases, enabled, counts)
        self._reference: dict[int, PairScores] = {}

    def metric(self) -> TokenMatch:
        """Return a fresh metric."""
        return TokenMatch(("rewrite_acc", "rephrase_acc", "portability_acc", "locality_acc"))

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Keep the unedited model's first choices at the answers of the locality probes."""
        super().take_reference(model, cases)
        self._reference = self._locality(model, self.chosen(cases))

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Score every prompt of the cases and add them to the metric.

        Raises:
            UserError: There are locality probes, but :meth:`take_reference` was not called.
        """
        assert isinstance(metric, TokenMatch)
        cases = self.chosen(cases)
        kinds = {"rewrite_acc": edit_pair, "rephrase_acc": paraphrase_pairs, "portability_acc": portability_pairs}
        for kind, scores, owner in score_kinds(model, cases, kinds):
            metric.update(kind, scores.num_hits, scores.num_tokens, owner, nonfinite=scores.nonfinite)
        for case, scores in self._locality(model, cases).items():
            if case not in self._reference:
                raise UserError("edit/easyedit compares with the unedited model: call take_reference on it first")
            owner = scores.num_tokens.new_full((len(scores.num_tokens),), case)
            agreeing = scores.num_agreeing(self._reference[case])
            metric.update("locality_acc", agreeing, scores.num_tokens, owner, nonfinite=scores.nonfinite)
        return metric.rows(cases)

    @staticmethod
    def _locality(model: LanguageModel, cases: Cases) -> dict[int, PairScores]:
        found: dict[int, PairScores] = {}
        for group in comparable(model, cases):
            for _, scores, owner in score_kinds(model, group, {"locality": locality_pairs}):
                found |= {case: scores[owner == case] for case in owner.unique().tolist()}
        return found
