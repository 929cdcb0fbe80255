"""Checks, when training is set up, the order in which callbacks process a step of an edit stream."""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise

import lightning as L

from prune_lightning.errors import UserError


class Place(IntEnum):
    """The position of a callback: those that change the model come before those that read it; the ledger is last."""

    RESTRAINT = 0
    GUARD = 1
    LOG = 2
    EVALUATION = 3
    LEDGER = 4


def check_order(trainer: L.Trainer) -> None:
    """Check that no callback reads a step before another one has changed it.

    Callbacks without a ``place`` may be listed anywhere.

    Raises:
        UserError: The order is wrong; the message names two callbacks.
    """
    placed = [callback for callback in trainer.callbacks if hasattr(callback, "place")]  # type: ignore[attr-defined]
    for one, other in pairwise(placed):
        if one.place > other.place:
            raise UserError(
                f"callbacks: list {type(other).__name__} before {type(one).__name__}; the order is restraints, guards, "
                "log, evaluation, ledger"
            )
