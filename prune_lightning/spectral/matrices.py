"""What a restraint needs of a matrix, and of a module that keeps such matrices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from prune_lightning.spectral.accumulated import AccumulatedChange
from prune_lightning.spectral.factored import FactoredMatrix
from prune_lightning.types import LowRankUpdate


class RestrainedMatrix(Protocol):
    r"""A weight :math:`W = W_0 + \Delta - A B^\top`: its change, less what a restraint withholds."""

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
        r"""Return :math:`\Delta - A B^\top`, the change that the live weight carries."""
        ...

    def step(self) -> Tensor:
        """Return the change of the latest step as it was computed."""
        ...

    def withhold(self, correction: LowRankUpdate | None) -> None:
        r"""Replace what is withheld and write the weight; :math:`\Delta` stays as it is."""
        ...

    def withholding(self, correction: LowRankUpdate | None) -> AbstractContextManager[None]:
        """Withhold inside a block; every bit is put back."""
        ...

    def subtract(self, correction: LowRankUpdate | Tensor) -> None:
        r"""Take a correction away from :math:`\Delta` for good and write the weight."""
        ...

    def rounding_loss(self) -> float:
        """Return the share of the change that the cast to the weight's dtype lost."""
        ...


@runtime_checkable
class HasEditedMatrices(Protocol):
    """A module that keeps the accumulated change of the matrices it edits."""

    @property
    def num_requests(self) -> int:
        """Requests handled so far."""
        ...

    def register_restraint(self, restraint: Any) -> None:
        """Let a restraint of these matrices take part in the life of the run."""
        ...

    def edited_matrices(self) -> Mapping[str, RestrainedMatrix]:
        """Return the matrices by the name of their weight."""
        ...
