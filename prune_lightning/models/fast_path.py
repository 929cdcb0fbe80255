"""Fast paths and what happens where an architecture does not fit one: the plain path, and one warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.errors import UserError

T = TypeVar("T")


def agrees(rerun: Tensor, ordinary: Tensor) -> bool:
    """Whether the logits of a rerun are those of the ordinary forward pass, but for rounding.

    Where the ordinary ones are not finite, there is nothing to tell the two apart.
    """
    # Some norms and rotations of `transformers` run in fp32 whatever the dtype of the model.
    tolerance, scale = max(torch.finfo(rerun.dtype).eps ** 0.5, 1e-6), float(ordinary.double().norm())
    error = float((rerun.double() - ordinary.double()).norm())
    return error <= tolerance * scale or not scale < float("inf")


class FastPath:
    """Remembers which fast paths do not fit a model, so that each is tried, and warned of, once.

    Args:
        architecture: Name of the model's class, for the warning.
    """

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self._refused: set[str] = set()

    def attempt(self, kind: str, run: Callable[[], T | None]) -> T | None:
        """Return what ``run`` returns, or ``None`` where the plain path has to do the work.

        Args:
            kind: Which fast path, in words; "the fast path of the value optimisation".
            run: Returns ``None`` if the fast path gives other numbers than the whole model. An exception counts as a
                misfit too, except for lack of memory and for errors that the user has to mend.
        """
        if kind in self._refused:
            return None
        cause = "its logits are not those of the whole model"
        try:
            result = run()
            if result is not None:
                return result
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # whatever another architecture's code raises when it is called in parts
            cause = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self._refused.add(kind)
        rank_zero_warn(
            f"the fast path of {kind} does not fit {self._architecture} ({cause}); the whole model runs at every step"
        )
        return None
