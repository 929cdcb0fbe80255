"""Figures of the edited matrices at an evaluated count."""

from __future__ import annotations

from collections.abc import Collection

from prune_lightning.evaluation.measurement import Measured
from prune_lightning.spectral import RestrainedMatrix, condition_number, sigma_max

SPECTRUM = {
    "title": "spectrum",
    "scores": {
        "sigma_max_delta": "largest σ of the change",
        "condition_number": "condition number",
        "norm_ratio": "norm, relative to the original's",
        "relative_change": "norm of the change, relative to the original's",
    },
    "headlines": {},
    "short": ["sigma_max_delta", "condition_number"],
    "lower": ["condition_number", "sigma_max_delta"],
}


def spectrum(matrices: Collection[RestrainedMatrix]) -> Measured:
    """Return the largest figures of some matrices (change, condition and norm); nothing without matrices."""
    if not matrices:
        return Measured({})
    norms = [[float(t.double().norm()) for t in (m.original(), m.weight(), m.delta())] for m in matrices]
    return Measured(
        {
            "norm_ratio": max(now / before for before, now, _ in norms),
            "relative_change": max(change / before for before, _, change in norms),
            "sigma_max_delta": max(sigma_max(matrix.delta()) for matrix in matrices),
            "condition_number": max(condition_number(matrix.weight()) for matrix in matrices),
        }
    )
