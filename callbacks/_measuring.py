"""How long callbacks take, and what the evaluation measures by itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import lightning as L

from prune_lightning.evaluation.measurement import Measured
from prune_lightning.methods.base import EditingModule
from prune_lightning.spectral import condition_number, sigma_max

Hook = TypeVar("Hook", bound=Callable[..., None])


def part_of_phase(name: str) -> Callable[[Hook], Hook]:
    """Decorate a callback's hook: on editing modules its time is a part of the running phase, ``PHASE/name``."""

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def inside(self: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
            if not isinstance(pl_module, EditingModule):
                return hook(self, trainer, pl_module, *args, **kw)
            with pl_module.phase_clock.part(name):
                return hook(self, trainer, pl_module, *args, **kw)

        return cast(Hook, inside)

    return decorate


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
