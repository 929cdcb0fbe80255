"""Bootstrap intervals of means over cases."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def resampled_means(
    values: Floats, weights: Floats | None = None, resamples: int = 1000, seed: int = 0, block: int = 4096
) -> Floats:
    """Return the mean over cases in each of ``resamples`` draws of the cases with replacement.

    Equal numbers of cases and equal seeds draw the same cases, so that two models can be compared in pairs.

    Args:
        values: One row per case, shape ``(cases, scores)``.
        weights: Weight of each case; all equal by default.
        resamples: Number of draws.
        seed: Seed of the draws.
        block: Number of draws times cases in memory at once, in thousands.

    Returns:
        Shape ``(resamples, scores)``.
    """
    generator = np.random.default_rng(seed)
    n = len(values)
    weights = np.ones(n) if weights is None else weights
    weighted = np.column_stack([values * weights[:, None], weights])
    means = []
    step = max(1, block * 1000 // n)
    for start in range(0, resamples, step):
        times_drawn = generator.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        sums = times_drawn @ weighted
        means.append(sums[:, :-1] / sums[:, -1:])
    return np.concatenate(means)


def interval(means: Floats, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of resampled means.

    >>> interval(np.arange(1001) / 1000)
    (0.025, 0.975)
    """
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return round(float(low), 12), round(float(high), 12)
