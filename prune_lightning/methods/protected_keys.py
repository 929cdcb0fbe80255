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

    The first keys of a layer wait until its inverse is used. So where every step starts from the unedited model, none
    ever gets into an inverse, and the first ones, which take :math:`O(n^3)`, are computed once.

    Args:
        start: Returns :math:`Q` before the first edit of a layer, shape ``(n, n)``, fp64; called on first use.
        keep: How the inverses are kept.
    """

    def __init__(self, start: Callable[[int], Tensor], keep: Keep | None = None) -> None:
        self._start, self._keep = start, keep
        self._inverses: dict[int, RecursiveInverse] = {}
        self._waiting: dict[int, Tensor] = {}  # the first keys of a layer
        self._grown: set[int] = set()  # layers with keys in their inverse

    def __contains__(self, layer: int) -> bool:
        """Whether keys of a layer are protected, or its inverse was requested."""
        return layer in self._inverses or layer in self._waiting

    def __getitem__(self, layer: int) -> RecursiveInverse:
        """Return the inverse of a layer."""
        if layer not in self._inverses:
            self._inverses[layer] = RecursiveInverse(self._start(layer), self._keep)
        if layer in self._waiting:
            self._inverses[layer].add(self._waiting.pop(layer))
            self._grown.add(layer)
        return self._inverses[layer]

    def add(self, keys: Mapping[str, Tensor]) -> None:
        """Protect keys.

        Args:
            keys: By the layer's number, each of shape ``(n, b)``, fp64.
        """
        for name, of_layer in keys.items():
            layer = int(name)
            if layer in self._waiting or layer in self._grown:
                self[layer].add(of_layer)
            else:
                self._waiting[layer] = of_layer

    def state_dict(self) -> dict[str, Tensor]:
        """Return the inverses by the layer's number; not a copy."""
        for layer in list(self._waiting):
            _ = self[layer]
        return {str(layer): each.inverse for layer, each in self._inverses.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the inverses by copies of what :meth:`state_dict` returned."""
        self._inverses = {int(layer): RecursiveInverse(inverse.clone(), self._keep) for layer, inverse in state.items()}
        self._waiting, self._grown = {}, set(self._inverses)

    def to(self, device: torch.device) -> ProtectedKeys:
        """Move to a device, in place."""
        self._inverses, self._waiting = to_device((self._inverses, self._waiting), device)
        return self

    def clear(self) -> None:
        """Protect nothing. Inverses that hold no keys stay."""
        self._inverses = {layer: each for layer, each in self._inverses.items() if layer not in self._grown}
        self._waiting, self._grown = {}, set()


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
