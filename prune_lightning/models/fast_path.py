"""Fast paths, with one warning and a fallback to the plain path for architectures that do not support them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.distributed import true_on_all_ranks
from prune_lightning.errors import UserError
from prune_lightning.models.packed_weights import PackedWeights

T = TypeVar("T")


def agrees(rerun: Tensor, ordinary: Tensor) -> bool:
    """Whether the logits of a rerun equal those of the ordinary forward pass up to rounding.

    Positions with non-finite ordinary logits are not compared.
    """
    # Some norms and rotations of `transformers` always run in fp32.
    tolerance, scale = max(torch.finfo(rerun.dtype).eps ** 0.5, 1e-6), float(ordinary.double().norm())
    error = float((rerun.double() - ordinary.double()).norm())
    return error <= tolerance * scale or not scale < float("inf")


class FastPath:
    """Remembers which fast paths failed on a model, so that each is tried and warned about once.

    The processes of a sharded model take a fast path only together: where rounding decides, one may refuse what the
    others would take, and they need one another in every pass.

    Args:
        architecture: Name of the model's class, for the warning.
        sharded: Returns whether the model is sharded.

    Attributes:
        packed: Copies of weights that fast paths multiply with.
    """

    def __init__(self, architecture: str, sharded: Callable[[], bool] = lambda: False) -> None:
        self._architecture, self._sharded = architecture, sharded
        self._refused: set[str] = set()
        self._held: dict[str, bool] = {}
        self.packed = PackedWeights()

    def holds(self, kind: str, check: Callable[[], bool]) -> bool:
        """Return whether a fast path fits the model, which is checked once; nothing is said if it does not."""
        if kind not in self._held:
            self._held[kind] = self._on_all(check())
        return self._held[kind]

    def _on_all(self, fits: bool) -> bool:
        return true_on_all_ranks(fits) if self._sharded() else fits

    def attempt(self, kind: str, run: Callable[[], T | None]) -> T | None:
        """Return the value of ``run``, or ``None`` if the plain path has to be used.

        Args:
            kind: Name of the fast path for the warning, e.g. "the value optimisation".
            run: Returns ``None`` if the fast path differs from the whole model. An exception also disables the fast
                path, except for out-of-memory errors and :class:`UserError`.
        """
        if kind in self._refused:
            return None
        cause = "its logits are not those of the whole model"
        result: T | None = None
        try:
            result = run()
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # an architecture's code can raise anything when it is called in parts
            cause = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if self._on_all(result is not None):
            return result
        self._refused.add(kind)
        rank_zero_warn(
            f"the fast path of {kind} does not fit {self._architecture} ({cause}); the whole model runs at every step"
        )
        return None
