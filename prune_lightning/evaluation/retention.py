"""Retention: the share of its abilities that a model keeps, over the tasks that say something about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prune_lightning.evaluation.measurement import Measurement
from prune_lightning.metrics.bootstrap import Floats, interval
from prune_lightning.metrics.functional import retention


class Retention:
    """Computes the retention of each measurement that has tasks.

    A task counts if the unedited model is clearly better than chance at it: the lower end of its 95 % interval lies
    above the chance level. A score without rows has no interval, so the score itself decides.

    Attributes:
        tasks: By measurement, the tasks that count, each with its chance level.
        left_out: The other tasks, likewise.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, dict[str, float]] = {}
        self.left_out: dict[str, dict[str, float]] = {}
        self._before: dict[str, float] = {}
        self._resampled: dict[str, Floats] = {}

    def decide(
        self, measurements: Sequence[Measurement], scores: Mapping[str, float], means: Mapping[str, Floats]
    ) -> None:
        """Choose the tasks.

        Args:
            measurements: The measurements.
            scores: Their scores on the unedited model.
            means: By score, its mean and its means over resampled cases; see :func:`~.case_rows.resampled`.
        """
        self._before, self._resampled = dict(scores), dict(means)
        for measurement in measurements:
            name = measurement.name
            for task, chance in measurement.tasks.items():
                key = f"{name}/{task}"
                low = interval(means[key][1:])[0] if key in means else scores[key]
                (self.tasks if low > chance else self.left_out).setdefault(name, {})[task] = chance

    def add(self, measurements: Sequence[Measurement], scores: dict[str, float], means: dict[str, Floats]) -> None:
        """Add the retention of each measurement to its scores, and to their resampled means; NaN if no task counts."""
        for measurement in measurements:
            if not measurement.tasks:
                continue
            name = measurement.name
            chance = {f"{name}/{task}": level for task, level in self.tasks.get(name, {}).items()}
            scores[f"{name}/retention"] = retention(scores, self._before, chance)
            if chance and all(key in means and key in self._resampled for key in chance):
                shares = [_share(means[key], self._resampled[key], level) for key, level in chance.items()]
                means[f"{name}/retention"] = np.mean(np.maximum(shares, 0.0), axis=0)

    def num_cases(self, found: Mapping[str, int]) -> dict[str, int]:
        """Return the number of items behind the retention of each measurement.

        Args:
            found: Number of items behind each score.
        """
        items = {
            name: [found[f"{name}/{task}"] for task in tasks if f"{name}/{task}" in found]
            for name, tasks in self.tasks.items()
        }
        return {f"{name}/retention": sum(counts) for name, counts in items.items() if counts}

    def facts(self) -> dict[str, Any]:
        """Return, by measurement, the tasks that count and those left out, with their chance levels."""
        names = dict.fromkeys([*self.tasks, *self.left_out])
        return {name: {"tasks": self.tasks.get(name, {}), "left_out": self.left_out.get(name, {})} for name in names}

    def remarks(self) -> list[str]:
        """Return a sentence on each measurement that has tasks which do not count."""
        return [
            f"The retention of {name} leaves out {', '.join(out)}: not clearly above chance before the first edit."
            for name, out in self.left_out.items()
        ]


def _share(now: Floats, before: Floats, chance: float) -> Floats:
    """Return the share of a task that is kept, and in each draw the share to first order around it.

    The same cases are drawn for both models, so that chance in the draw cancels. To first order, since a draw in which
    the unedited model is hardly better than chance has a quotient without meaning.

    Args:
        now: The score, and its means over resampled cases.
        before: The same of the unedited model.
        chance: The chance level, below the score of the unedited model.
    """
    ability = before[0] - chance
    share = (now[0] - chance) / ability
    kept: Floats = (now - chance - share * (before - before[0])) / ability
    return kept
