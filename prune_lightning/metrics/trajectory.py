"""Figures of a score over a stream of edits: relative score, area, collapse, and the median over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prune_lightning.errors import UserError


def relative(scores: Tensor, before: float, chance: float = 0.0) -> Tensor:
    r"""Return :math:`g(t) = (G(t) - G_c)/(G(0) - G_c)`; non-finite scores count as 0.

    Args:
        scores: :math:`G(t)`, shape ``(n,)``.
        before: :math:`G(0)`, of the unedited model.
        chance: :math:`G_c`, the score of guessing.

    >>> relative(torch.tensor([0.75, 0.5, float("nan")]), before=0.75, chance=0.25).tolist()
    [1.0, 0.5, 0.0]
    """
    shares = (scores.double() - chance) / (before - chance)
    return torch.where(torch.isfinite(shares), shares, 0.0)


def area(counts: Tensor, values: Tensor, log: bool = False) -> float:
    r"""Return :math:`\frac{1}{x_K - x_0} \sum_k \frac12 (g_k + g_{k+1})(x_{k+1} - x_k)`; NaN for fewer than two points.

    Args:
        counts: Edit counts :math:`t_k`, ascending.
        values: :math:`g_k`.
        log: Use :math:`x = \log_2(1 + t)` instead of :math:`x = t`.

    >>> area(torch.tensor([0, 1, 3]), torch.tensor([1.0, 1.0, 0.0]))
    0.6666666666666666
    >>> area(torch.tensor([0, 1, 3]), torch.tensor([1.0, 1.0, 0.0]), log=True)
    0.75
    """
    if len(counts) < 2:
        return math.nan
    x = torch.log2(1 + counts.double()) if log else counts.double()
    return float(torch.trapezoid(values.double(), x) / (x[-1] - x[0]))


def collapse(counts: Sequence[int], collapsed: Sequence[bool], persistence: int = 2) -> int | None:
    """Return the first count of at least ``persistence`` consecutive collapsed checkpoints, or ``None``.

    >>> collapse([0, 10, 20, 30, 40], [False, True, False, True, True])
    30
    >>> collapse([0, 10, 20], [False, False, True]) is None
    True
    """
    for k in range(len(counts) - persistence + 1):
        if all(collapsed[k : k + persistence]):
            return counts[k]
    return None


def first_below(counts: Sequence[int], scores: Sequence[float], threshold: float) -> int | None:
    r"""Return the first count with a score below ``threshold`` (CP@:math:`\theta`) or NaN, or ``None``.

    >>> first_below([1, 10, 100], [0.9, 0.7, 0.5], 0.6)
    100
    """
    return next((t for t, score in zip(counts, scores, strict=True) if not score >= threshold), None)


def kaplan_meier_median(times: Sequence[float], observed: Sequence[bool]) -> float | None:
    r"""Return the Kaplan-Meier median of right-censored times; ``None`` if it is not reached.

    The first time at which :math:`S(t) = \prod_{t_j \le t} (1 - d_j/n_j) \le \frac12`, with :math:`d_j` events among
    :math:`n_j` runs that were still under observation.

    Args:
        times: Time of the event, or of the end of the observation.
        observed: Whether the event was observed.

    >>> kaplan_meier_median([30, 50, 100], [True, True, False])
    50
    >>> kaplan_meier_median([30, 100, 100], [True, False, False]) is None
    True
    """
    if len(times) != len(observed):
        raise UserError(f"{len(times)} times, but {len(observed)} marks of whether the event was observed")
    survival = 1.0
    for time in sorted(set(times)):
        at_risk = sum(other >= time for other in times)
        events = sum(other == time and seen for other, seen in zip(times, observed, strict=True))
        survival *= 1 - events / at_risk
        if events and survival <= 0.5 + 1e-12:
            return time
    return None
