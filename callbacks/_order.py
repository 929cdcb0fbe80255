"""Checks, when training is set up, the order in which callbacks process a step, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Protocol

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


class _Withholding(Protocol):
    """What is read of a restraint."""

    @property
    def withholds(self) -> bool: ...

    @property
    def matrices(self) -> Mapping[str, object]: ...


def check_withheld_last(one: _Withholding, others: Sequence[_Withholding]) -> None:
    """Check that the last restraint of a matrix is the only one that withholds a part of it.

    What is withheld is a part of the sum of all steps. Another restraint would compute with that sum, too, and take it
    away a second time.

    Raises:
        UserError: ``one`` restrains a matrix of which an earlier restraint withholds a part; the message names both.
    """
    for other in others:
        if not (other.withholds and one.matrices.keys() & other.matrices.keys()):
            continue
        first, second = type(other).__name__, type(one).__name__
        if one.withholds:
            raise UserError(
                f"{first} and {second} both withhold a part of the same matrices, and only that of the latter would "
                "count: give one of them other `parameters`, or leave it out"
            )
        raise UserError(
            f"callbacks: list {second} before {first}, which withholds a part of the sum that {second} computes with"
        )
