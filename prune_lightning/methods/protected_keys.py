"""The keys of earlier edits, which MEMIT and AlphaEdit protect from later edits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.devices import to_device
from prune_lightning.methods.layerwise import LayerwiseEdit
from prune_lightning.methods.least_squares import RecursiveInverse
from prune_lightning.models.second_moment import Keep
from prune_lightning.types import EditRequest


class ProtectedKeys:
    r"""Per layer the inverse :math:`Q` of a matrix that grows by the keys written so far.

    Args:
        start: Returns :math:`Q` before the first edit of a layer, shape ``(n, n)``, fp64; called on first use.
        keep: How the inverses are kept.
    """

    def __init__(self, start: Callable[[int], Tensor], keep: Keep | None = None) -> None:
        self._start, self._keep = start, keep
        self._inverses: dict[int, RecursiveInverse] = {}

    def __contains__(self, layer: int) -> bool:
        """Whether a layer has an inverse, because keys were added or it was requested."""
        return layer in self._inverses

    def __getitem__(self, layer: int) -> RecursiveInverse:
        """Return the inverse of a layer."""
        if layer not in self._inverses:
            self._inverses[layer] = RecursiveInverse(self._start(layer), self._keep)
        return self._inverses[layer]

    def add(self, keys: Mapping[str, Tensor]) -> None:
        """Protect keys.

        Args:
            keys: By the layer's number, each of shape ``(n, b)``, fp64.
        """
        for layer, of_layer in keys.items():
            self[int(layer)].add(of_layer)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the inverses by the layer's number; not a copy."""
        return {str(layer): each.inverse for layer, each in self._inverses.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the inverses by copies of what :meth:`state_dict` returned."""
        self._inverses = {int(layer): RecursiveInverse(inverse.clone(), self._keep) for layer, inverse in state.items()}

    def to(self, device: torch.device) -> ProtectedKeys:
        """Move to a device, in place."""
        self._inverses = to_device(self._inverses, device)
        return self

    def clear(self) -> None:
        """Protect nothing."""
        self._inverses = {}


class KeyProtectingEdit(LayerwiseEdit):
    """Base of the batch methods that protect the keys of earlier batches, read after their batch was written.

    Attributes:
        protected: The inverses that include the protected keys.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.protected = ProtectedKeys(self.unprotected_inverse, self.second_moments.keep)

    @abstractmethod
    def unprotected_inverse(self, layer: int) -> Tensor:
        """Return a layer's inverse before any edit, as a new tensor, ``(in_features, in_features)``, fp64."""

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the keys of the batch."""
        return self.present_keys(requests)

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Protect the keys of a batch."""
        self.protected.add(observed)

    def memory(self) -> Mapping[str, Tensor]:
        """Return the inverses, by layer."""
        return self.protected.state_dict()

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Replace the inverses."""
        self.protected.load_state_dict(memory)

    def forget(self) -> None:
        """Remove all protected keys."""
        self.protected.clear()
