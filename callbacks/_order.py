"""The order in which callbacks see a step of an edit stream, checked when training is set up."""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise

import lightning as L

from prune_lightning.errors import UserError


class Place(IntEnum):
    """Where a callback belongs: one that changes the model comes before one that looks at it, the ledger is last."""

    RESTRAINT = 0
    GUARD = 1
    LOG = 2
    EVALUATION = 3
    LEDGER = 4


def check_order(trainer: L.Trainer) -> None:
    """Refuse callbacks in an order in which one would see a step that another has not dealt with yet.

    Callbacks without a ``place`` may stand anywhere.

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
