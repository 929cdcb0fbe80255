"""Scoring edit requests on a model: one batched pass over all their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.metrics import EditingScore
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest


def prompts_by_kind(request: EditRequest, kind: str) -> list[tuple[str, str, str | None]]:
    """Return ``(prompt, wanted answer, other answer)`` of a request's prompts of one kind."""
    if kind == "efficacy":
        return [(request.prompt, request.target_new, request.target_old)]
    if kind == "generalization":
        return [(prompt, request.target_new, request.target_old) for prompt in request.paraphrases]
    return [(probe.prompt, probe.answer, request.target_new) for probe in request.locality if probe.answer]


@torch.no_grad()
def update_editing_score(metric: EditingScore, model: LanguageModel, requests: Sequence[EditRequest]) -> None:
    """Score every prompt of the requests and add them to the metric.

    Args:
        metric: The metric to update.
        model: The model to score.
        requests: Each request is one case.
    """
    pairs: list[tuple[str, str]] = []
    prompts: dict[tuple[str, bool], list[tuple[int, int]]] = {}  # (kind, compared): (case, index of the wanted answer)
    for number, request in enumerate(requests):
        for kind in metric.KINDS:
            for prompt, wanted, other in prompts_by_kind(request, kind):
                prompts.setdefault((kind, other is not None), []).append((number, len(pairs)))
                pairs.append((prompt, wanted))
                if other is not None:
                    pairs.append((prompt, other))
    scores = score_pairs(model, pairs)
    for (kind, compared), places in prompts.items():
        case, wanted_at = torch.tensor(places, device=model.device).unbind(1)
        other_nll = scores.nll[wanted_at + 1] if compared else None
        metric.update(kind, scores.nll[wanted_at], other_nll, scores.hit[wanted_at], case)
