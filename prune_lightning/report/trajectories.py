"""Summaries of how scores develop along a stream of edits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prune_lightning.metrics import AbilityCurve
from prune_lightning.metrics.trajectory import area, first_below

Curve = Sequence[Mapping[str, Any]]
LOW_EDIT_SCORE = 0.6


def points(curve: Curve, key: str) -> tuple[list[int], list[float]]:
    """Return the edit counts at which a score was taken, and the score; what is not finite is NaN."""
    taken = [(entry["num_requests"], entry[key]) for entry in curve if key in entry]
    return [count for count, _ in taken], [math.nan if value is None else float(value) for _, value in taken]


def ability_trajectories(curve: Curve, keys: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return area, area over log2(1 + t) and edits to collapse of scores relative to the unedited model.

    Args:
        curve: Scores at each evaluated count.
        keys: Scores for which higher is better, each with its chance level; those that were not above it before the
            first edit are left out.
    """
    result = {}
    for key, chance in keys.items():
        counts, scores = points(curve, key)
        if counts and scores[0] > chance:
            metric = AbilityCurve(chance=chance)
            for count, score in zip(counts, scores, strict=True):
                metric.update(count, score)
            result[key] = {name: float(value) for name, value in metric.compute().items()}
    return result


def edit_trajectories(curve: Curve, keys: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return the areas of edit scores, from the first edit on, and the first count at which one is below 0.6 (CP@0.6).

    Args:
        curve: Scores at each evaluated count.
        keys: Scores over the edits so far; those that were never taken are left out.
    """
    result: dict[str, dict[str, float | None]] = {}
    for key in keys:
        counts, scores = points([entry for entry in curve if entry["num_requests"]], key)
        if counts:
            x, y = torch.tensor(counts), torch.tensor(scores, dtype=torch.float64).nan_to_num(0.0)
            result[key] = {
                "area": area(x, y),
                "area_log": area(x, y, log=True),
                "first_below": first_below(counts, scores, LOW_EDIT_SCORE),
            }
    return result


def log_growth(curve: Sequence[Mapping[str, float]], suffix: str = "/norm_ratio") -> dict[str, float]:
    r"""Return the least-squares slope of :math:`\\ln\\|W_t\\|_F` against the edits, for each matrix.

    Args:
        curve: Measurements of a spectrum monitor.
        suffix: Suffix of the keys that hold the norm relative to the original's.
    """
    names = [key for key in (curve[0] if len(curve) > 1 else {}) if key.endswith(suffix) and "/delta" not in key]
    steps = torch.tensor([look["step"] for look in curve], dtype=torch.float64)
    result = {}
    for name in names:
        logs = torch.tensor([look[name] for look in curve], dtype=torch.float64).log()
        centred = steps - steps.mean()
        result[name.removesuffix(suffix)] = float((centred @ logs) / (centred @ centred))
    return result
