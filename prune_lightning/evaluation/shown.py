"""How tables, plots and pages show the scores of a measurement."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prune_lightning.evaluation.measurement import Headline, Measurement
from prune_lightning.evaluation.stream import StreamScores

_RETENTION = Headline("retention", "Share of the unedited model's abilities that is left.")


def shown(part: StreamScores | Measurement) -> dict[str, Any]:
    """Return how the scores of a measurement are shown; its tasks need no labels of their own."""
    tasks = {task: task.replace("_", " ") for task in part.tasks} | ({"retention": "retention"} if part.tasks else {})
    headlines = {quantity: asdict(headline) for quantity, headline in part.headlines.items()}
    if part.tasks:
        headlines["retention"] = asdict(_RETENTION)
    return {
        "title": part.title or part.name,
        "scores": dict(part.labels) | {key: text for key, text in tasks.items() if key not in part.labels},
        "headlines": headlines,
        "short": list(part.short),
        "lower": sorted(part.lower),
    }
