"""The one interface of everything that an edit can change: a weight matrix, or a memory beside the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lightning.types import DenseUpdate, Update


@dataclass(frozen=True)
class Event:
    """One change of an edited part.

    Args:
        kind: ``add`` an update. Of a matrix also ``subtract`` a correction permanently, ``withhold`` one from the
            weight (replacing the previously withheld one), or ``drop`` entries of the update and of what was withheld
            (replacing that).
        change: The update or correction, or the mask of the entries; ``None`` if nothing is withheld any more.
        recomputed: The correction was not stored; a replay has the restraint compute it again.
    """

    kind: str
    change: Update | None
    recomputed: bool = False

    @property
    def exact(self) -> bool:
        """Whether the change has the same bits after it on every processor, which a product of factors has not."""
        return self.kind != "subtract" or isinstance(self.change, DenseUpdate)


class EditedPart(ABC):
    """A part of the model that edits change.

    An edit run, the ledger and everything behind them know edits by this interface alone.

    Attributes:
        name: Its name; of a matrix the qualified name of the weight.
        journal: The events of this step, in order.
        inseparable: Why a single edit cannot be taken out of the middle of a stream, or ``None`` if it can.
    """

    name: str
    journal: list[Event]
    inseparable: str | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of its state."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of its state, roughly."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether its recorded updates restore its state bit for bit."""

    @abstractmethod
    def to(self, device: torch.device) -> EditedPart:
        """Move the state to the device of the model, in place."""

    # -- a step ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def check(self, update: Update) -> None:
        """Raise a ``ValueError`` if an update is of another kind or shape."""

    @abstractmethod
    def can_hold(self, update: Update) -> bool:
        """Whether an update is finite, also in the model's dtype."""

    @abstractmethod
    def begin_step(self) -> None:
        """Clear the events of the previous step."""

    @abstractmethod
    def add(self, update: Any) -> None:
        """Add an update, as an event, and have the model show it."""

    @abstractmethod
    def replay(self, events: Iterable[Event]) -> None:
        """Repeat the events of an earlier step, bit for bit; call :meth:`write` to have the model show them."""

    @abstractmethod
    def write(self) -> None:
        """Have the model show the state."""

    @abstractmethod
    def restore(self) -> None:
        """Restore the unedited model, bit for bit."""

    # -- views ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def provisional(self) -> AbstractContextManager[None]:
        """Restore the model, bit for bit, after the block."""

    @abstractmethod
    def unedited(self) -> AbstractContextManager[None]:
        """Inside the block the model is the unedited one, afterwards as before, bit for bit."""

    # -- identity and state ---------------------------------------------------------------------------------------
    @abstractmethod
    def original_fingerprint(self) -> str:
        """Return a fingerprint of the unedited model that the edits apply to."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a fingerprint of the present state."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the state; tensors are not copied."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a :meth:`state_dict` and have the model show it, bit for bit."""
