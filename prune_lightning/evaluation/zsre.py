"""zsRE as scored by MEMIT: the share of the target's tokens that are first choices under teacher forcing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torchmetrics import Metric

from prune_lightning.evaluation.measurement import Cases, EditingMeasurement, Headline
from prune_lightning.evaluation.prompts import edit_pair, locality_pairs, paraphrase_pairs, score_kinds
from prune_lightning.metrics import TokenMatch
from prune_lightning.metrics.functional import harmonic_mean
from prune_lightning.models.language_model import LanguageModel


class ZsREScores(EditingMeasurement):
    """Token accuracy of efficacy, generalization and specificity (Meng et al., 2023), and their harmonic mean.

    Specificity is measured against the true answer of the unrelated question, not against the unedited model's answer,
    so an unedited model does not reach 1.
    """

    name = "edit/zsre"
    title = "edits, zsRE"
    labels: ClassVar[Mapping[str, str]] = {
        "efficacy": "efficacy, token accuracy",
        "generalization": "generalization, token accuracy",
        "specificity": "specificity, token accuracy",
        "harmonic": "harmonic mean",
        "num_nonfinite": "scores that are not finite",
    }
    headlines: ClassVar[Mapping[str, Headline]] = {
        "efficacy": Headline("efficacy", "Each token of the new answer is the model's first choice."),
        "generalization": Headline("generalization", "The same, after paraphrases of the prompt."),
        "locality": Headline("specificity", "Each token of the answers to unrelated questions is the first choice."),
    }
    short: ClassVar[Sequence[str]] = ("harmonic",)

    KINDS: ClassVar[Sequence[str]] = ("efficacy", "generalization", "specificity")

    def metric(self) -> TokenMatch:
        """Return a fresh metric."""
        return TokenMatch(self.KINDS, harmonic=True)

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the harmonic mean."""
        return {"harmonic": float(harmonic_mean(torch.tensor([means[kind] for kind in self.KINDS])))}

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Score every prompt of the cases and add them to the metric."""
        assert isinstance(metric, TokenMatch)
        kinds = {"efficacy": edit_pair, "generalization": paraphrase_pairs, "specificity": locality_pairs}
        for kind, scores, case in score_kinds(model, cases, kinds):
            metric.update(kind, scores.num_hits, scores.num_tokens, case, nonfinite=scores.nonfinite)
        return metric.rows(cases)
