"""Finds the edit at which a model collapsed, between two evaluated counts, by bisection over rebuilt states."""

from __future__ import annotations

import math
from collections.abc import Callable

from prune_lightning.callbacks import EditEvaluation
from prune_lightning.evaluation.evaluator import Evaluator
from prune_lightning.evaluation.measurement import Measurement
from prune_lightning.ledger import Ledger, rebuild
from prune_lightning.ledger.replay import Restrain
from prune_lightning.methods.base import EditingModule
from prune_lightning.metrics.functional import retention
from prune_lightning.report.trajectories import ability_trajectories

THRESHOLD = 0.5


def first_true(answer: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest number above ``low`` with a true answer; answers are monotone and true at ``high``.

    >>> first_true(lambda number: number >= 13, 10, 20)
    13
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if answer(middle) else (middle, high)
    return high


def bisect_collapses(
    module: EditingModule, ledger: Ledger, evaluation: EditEvaluation, restrain: Restrain | None
) -> dict[str, int]:
    """Return the number of edits to collapse of each group of abilities, exact to one step.

    A group has collapsed if its retention is at most one half at two consecutive evaluated counts. States between the
    first of these and the count before it are rebuilt and measured. The module's state is restored at the end.

    Args:
        module: The edited module.
        ledger: The ledger of its stream.
        evaluation: The evaluation of the stream.
        restrain: See :func:`prune_lightning.ledger.replay`.
    """
    found = {}
    for measurement in evaluation.measurements:
        key = f"{measurement.name}/retention"
        known = ability_trajectories(evaluation.curve, {key: 0.0}).get(key, {})
        count = known.get("edits_to_collapse", math.nan)
        if not measurement.tasks or not count < math.inf:
            continue
        earlier = max(
            entry["num_requests"] for entry in evaluation.curve if entry["num_requests"] < count and key in entry
        )
        ends = [line["num_requests"] for line in ledger.lines]
        low, high = sum(end <= earlier for end in ends), sum(end <= count for end in ends)

        def collapsed(step: int, measurement: Measurement = measurement) -> bool:
            _go_to(module, ledger, step, restrain)
            return not _retention(measurement, module, evaluation.evaluator) > THRESHOLD

        found[key] = ends[first_true(collapsed, low, high) - 1]
    if found:
        _go_to(module, ledger, None, restrain)
    return found


def _go_to(module: EditingModule, ledger: Ledger, step: int | None, restrain: Restrain | None) -> None:
    module.run.restore()
    rebuild(module, ledger, step, restrain)


def _retention(measurement: Measurement, module: EditingModule, evaluator: Evaluator) -> float:
    chance = evaluator.retention.tasks[measurement.name]
    scores = measurement.measure(module.language_model).scores
    return retention(scores, {task: evaluator.baseline[f"{measurement.name}/{task}"] for task in chance}, chance)
