"""What the evaluation measures by itself, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prune_lightning.evaluation.measurement import Measured
from prune_lightning.methods.base import EditingModule
from prune_lightning.spectral import condition_number, sigma_max


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds spent inside the block to those of a name."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def edited_spectrum(module: EditingModule) -> Measured:
    """Return the largest singular value of the changes, and the worst condition number."""
    matrices = module.edited_matrices().values()
    return Measured(
        {
            "sigma_max_delta": max(sigma_max(matrix.delta()) for matrix in matrices),
            "condition_number": max(condition_number(matrix.weight()) for matrix in matrices),
        }
    )
