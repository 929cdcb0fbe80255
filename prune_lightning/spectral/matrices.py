"""The interfaces of a restrained matrix, and of a module with such matrices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from prune_lightning.spectral.accumulated import AccumulatedChange
from prune_lightning.spectral.factored import FactoredMatrix
from prune_lightning.types import LowRankUpdate


class RestrainedMatrix(Protocol):
    r"""A weight :math:`W = W_0 + \Delta - A B^\top`: its change minus what a restraint withholds."""

    @property
    def name(self) -> str:
        """Name of the weight."""
        ...

    @property
    def change(self) -> Tensor | AccumulatedChange | FactoredMatrix:
        r""":math:`\Delta`, the sum of all steps; what was subtracted is gone, what is withheld is not."""
        ...

    def original(self) -> Tensor:
        """Return :math:`W_0`."""
        ...

    def weight(self) -> Tensor:
        """Return the live weight."""
        ...

    def delta(self) -> Tensor:
        r"""Return :math:`\Delta - A B^\top`, the change of the live weight."""
        ...

    def step(self) -> Tensor:
        """Return the change of the latest step as computed."""
        ...

    def withhold(self, correction: LowRankUpdate | None) -> None:
        r"""Replace the withheld part and write the weight; :math:`\Delta` does not change."""
        ...

    def withholding(self, correction: LowRankUpdate | None) -> AbstractContextManager[None]:
        """Withhold a correction inside the block, then restore everything bit for bit."""
        ...

    def subtract(self, correction: LowRankUpdate | Tensor) -> None:
        r"""Subtract a correction from :math:`\Delta` permanently and write the weight."""
        ...

    def rounding_loss(self) -> float:
        """Return the relative error of the cast to the weight's dtype."""
        ...


@runtime_checkable
class HasEditedMatrices(Protocol):
    """A module that accumulates the changes of its edited matrices."""

    @property
    def num_requests(self) -> int:
        """Requests handled so far."""
        ...

    def feed_back(self, on: bool) -> None:
        """Have the next updates make up for what a restraint withholds, or no longer.

        Raises:
            UserError: The updates are not computed from what the weights lack.
        """
        ...

    def register_restraint(self, restraint: Any) -> None:
        """Register a restraint of these matrices with the run."""
        ...

    def edited_matrices(self) -> Mapping[str, RestrainedMatrix]:
        """Return the matrices by the name of their weight."""
        ...
