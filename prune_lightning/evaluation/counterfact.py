"""CounterFact's scores of the wanted answer, by comparison with the other one and by exact match, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torchmetrics import Metric

from prune_lightning.evaluation.measurement import Cases, EditingMeasurement, Headline
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.metrics import CounterFactScore
from prune_lightning.metrics.functional import harmonic_mean
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.text.separators import TextPair
from prune_lightning.types import EditRequest


class CounterFactScores(EditingMeasurement):
    """SCORE, MAGNITUDE and ACCURACY of efficacy, generalization and locality (Meng et al., 2022), and S."""

    name = "edit/counterfact"
    title = "edits, CounterFact"
    labels: ClassVar[Mapping[str, str]] = {
        "efficacy_score": "efficacy, success",
        "efficacy_accuracy": "efficacy, exact match",
        "generalization_score": "generalization, success",
        "generalization_accuracy": "generalization, exact match",
        "locality_score": "locality, success",
        "locality_accuracy": "locality, exact match",
        "harmonic_score": "harmonic mean, success",
        "harmonic_accuracy": "harmonic mean, exact match",
        "efficacy_magnitude": "efficacy, difference of probabilities",
        "generalization_magnitude": "generalization, difference of probabilities",
        "locality_magnitude": "locality, difference of probabilities",
        "num_nonfinite": "scores that are not finite",
        "num_retokenised": "prompts tokenised differently before the answer",
    }
    headlines: ClassVar[Mapping[str, Headline]] = {
        "efficacy": Headline("efficacy_score", "The new answer is likelier than the old one."),
        "generalization": Headline("generalization_score", "The same, after paraphrases of the prompt."),
        "locality": Headline("locality_score", "Unrelated prompts prefer their own answer to the new one."),
    }
    short: ClassVar[Sequence[str]] = ("efficacy_accuracy", "harmonic_score")

    def metric(self) -> CounterFactScore:
        """Return a fresh metric."""
        return CounterFactScore()

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return S of the scores, and of the accuracies."""
        kinds = {form: [means[f"{kind}_{form}"] for kind in CounterFactScore.KINDS] for form in ("score", "accuracy")}
        return {f"harmonic_{form}": float(harmonic_mean(torch.tensor(values))) for form, values in kinds.items()}

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Score every prompt of the cases and add them to the metric."""
        assert isinstance(metric, CounterFactScore)
        pairs: list[TextPair] = []
        # (kind, compared): (case, number of the prompt in it, index of the wanted answer's pair)
        prompts: dict[tuple[str, bool], list[tuple[int, int, int]]] = {}
        for case, request in cases.items():
            for kind in CounterFactScore.KINDS:
                for number, (wanted, other) in enumerate(pairs_by_kind(request, kind)):
                    prompts.setdefault((kind, other is not None), []).append((case, number, len(pairs)))
                    pairs += [wanted, *([other] if other else [])]
        scores = score_pairs(model, pairs)
        for (kind, compared), places in prompts.items():
            owner, order, at = torch.tensor(places, device=model.device).unbind(1)
            metric.update(
                kind,
                scores.nll[at],
                scores.nll[at + 1] if compared else None,
                scores.hit[at],
                owner,
                order,
                scores.retokenised[at],
            )
        return metric.rows(cases)


def pairs_by_kind(request: EditRequest, kind: str) -> list[tuple[TextPair, TextPair | None]]:
    """Return a request's prompts of one kind, each with the wanted answer and with the other one, if known."""
    new, old = request.target_new, request.target_old
    if kind == "efficacy":
        return [(request.pair(), request.pair(old) if old else None)]
    if kind == "generalization":
        others = request.paraphrase_pairs(old) if old else [None] * len(request.paraphrases)
        return list(zip(request.paraphrase_pairs(), others, strict=True))
    return [(probe.pair(), probe.pair(new)) for probe in request.locality if probe.answer]
