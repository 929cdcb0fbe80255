"""What each editing method writes for itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from prune_lightning.types import EditRequest, Update


class EditingMethod:
    """The part of an editing method that differs from others: only :meth:`compute_update` is needed.

    Attributes:
        in_weights: Whether edits change weights. Otherwise the edited model is more than a folder of weights can hold.
        mergeable: Whether a memory beside the weights can be merged into them, so that it answers every prompt.
        low_rank: Whether updates are factors of low rank, and not whole matrices.
        filters_steps: Whether the method has an optimizer of its own and gives its steps to ``run.step_filters``.
        takes_feedback: Whether updates are computed from what the outputs lack, with :meth:`.EditedMatrix.withheld_on`
            as a part of the outputs.
        takes_shards: Whether the method works on a model that is divided among processes: all of them call
            :meth:`compute_update` with the same requests, run the same passes, and read weights by
            :func:`~prune_lightning.sharding.whole`.
    """

    in_weights: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    filters_steps: ClassVar[bool] = False
    low_rank: ClassVar[bool] = True
    takes_feedback: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = False

    def check(self) -> None:
        """Raise what is known to prevent the edits, such as a missing file; called before anything is computed."""

    def prepare(self) -> None:
        """Compute, on the unedited model, what all edits need. It stays valid when the stream restarts.

        Called before the first evaluation, so that a failure costs no more than it has to.
        """

    def constants(self) -> Mapping[str, float]:
        """Return what :meth:`prepare` has measured on the stream; a continued run has to use the same numbers."""
        return {}

    def load_constants(self, constants: Mapping[str, float]) -> None:
        """Use the :meth:`constants` of the run that is continued; called before :meth:`prepare`."""

    @property
    def builds_on_earlier(self) -> str | None:
        """How an edit builds on the edits before it, as a clause that begins with the setting; ``None`` if it does not.

        A wrapper that has each edit computed on the unedited model, such as SimIE, refuses the setting.
        """
        return None

    @classmethod
    def unusable(cls, request: EditRequest) -> str | None:
        """Return why the method cannot write a request, or ``None`` if it can; called before the first edit."""
        return None

    @abstractmethod
    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[Mapping[str, Update], list[dict[str, Any]]]:
        """Return the update of each edited part, by name, and the details to report of each request.

        The update of a matrix is factored where the method knows factors, dense otherwise. The model must be unchanged,
        bit for bit, when this returns.
        """

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return, by name, what must be remembered of requests that have been written, such as their keys.

        Called once per step, on the model after every restraint.
        """
        return {}

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Add what :meth:`observe` returned, now or in the run that is resumed."""

    def memory(self) -> Mapping[str, Tensor]:
        """Return the method's whole memory, for a checkpoint."""
        return {}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Replace the method's memory by a value of :meth:`memory`."""

    def forget(self) -> None:
        """Clear the method's memory."""
