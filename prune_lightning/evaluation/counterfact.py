"""CounterFact's scores: the wanted answer against the other one, and whether it is said; one batched pass."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from prune_lightning.evaluation.measurement import Cases, EditingMeasurement
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.metrics import EditingScore
from prune_lightning.metrics.functional import mean_by_case, preference
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest


class CounterFactScores(EditingMeasurement):
    """SCORE and ACCURACY of efficacy, generalization and locality (Meng et al., 2022)."""

    name = "edit/counterfact"

    def metric(self) -> Metric:
        """Return a fresh metric."""
        return EditingScore()

    @torch.no_grad()
    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Score every prompt of the cases and add them to the metric."""
        pairs: list[tuple[str, str]] = []
        prompts: dict[tuple[str, bool], list[tuple[int, int]]] = {}  # (kind, compared): (case, index of the answer)
        for number, request in cases.items():
            for kind in EditingScore.KINDS:
                for prompt, wanted, other in prompts_by_kind(request, kind):
                    prompts.setdefault((kind, other is not None), []).append((number, len(pairs)))
                    pairs.append((prompt, wanted))
                    if other is not None:
                        pairs.append((prompt, other))
        scores = score_pairs(model, pairs)
        rows: dict[int, dict[str, Any]] = {number: {"case": number} for number in cases}
        for (kind, compared), places in prompts.items():
            case, wanted_at = torch.tensor(places, device=model.device).unbind(1)
            other_nll = scores.nll[wanted_at + 1] if compared else None
            metric.update(kind, scores.nll[wanted_at], other_nll, scores.hit[wanted_at], case)
            values = {"accuracy": scores.hit[wanted_at]}
            if other_nll is not None:
                values["score"] = preference(scores.nll[wanted_at], other_nll)
            for form, value in values.items():
                means = mean_by_case(value.double(), case).tolist()
                for number, mean in zip(case.unique().tolist(), means, strict=True):
                    rows[number][f"{kind}_{form}"] = mean
        return list(rows.values())


def prompts_by_kind(request: EditRequest, kind: str) -> list[tuple[str, str, str | None]]:
    """Return ``(prompt, wanted answer, other answer)`` of a request's prompts of one kind."""
    if kind == "efficacy":
        return [(request.prompt, request.target_new, request.target_old)]
    if kind == "generalization":
        return [(prompt, request.target_new, request.target_old) for prompt in request.paraphrases]
    return [(probe.prompt, probe.answer, request.target_new) for probe in request.locality if probe.answer]
