"""What MEMIT, EMMET and AlphaEdit share: value targets at the last layer, spread over the layers from below."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.methods.locate_then_edit import LocateThenEdit, SubjectStates
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.types import EditRequest, WeightUpdate


class LayerwiseEdit(LocateThenEdit):
    r"""Base of the batch methods. A method says how keys and residuals of one layer become an update.

    The values :math:`Z` are optimised at the last layer's output, on the model before the batch. Then, layer by layer
    from below, each seeing the ones before already edited, :math:`\Delta_l` shall map the keys :math:`K_l` to

    .. math:: R_l = (Z - H)/(q - l + 1),

    the residual against the present hidden states, shared out over the layers that are still to come.
    """

    @abstractmethod
    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> WeightUpdate:
        """Return the update of one layer.

        Args:
            layer: Index of the layer.
            keys: :math:`K`, shape ``(in_features, b)``, fp64.
            residual: :math:`R`, shape ``(out_features, b)``, fp64.
        """

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, WeightUpdate], list[dict[str, Any]]]:
        """Return one update of rank ``b`` per layer."""
        values = self.optimise(requests, ShiftSite(self.layers[-1], "block"))
        updates: dict[str, WeightUpdate] = {}
        with self.provisional():
            for position, (layer, (name, matrix)) in enumerate(
                zip(self.layers, self.edited_matrices().items(), strict=True)
            ):
                states = self.subject_states(requests, self.prefixes, [layer])
                residual = (values.target.double() - states.hidden[:, 0]).T / (len(self.layers) - position)
                updates[name] = self.solve(layer, self.keys(states, layer), residual)
                matrix.add_provisionally(updates[name])
        return updates, values.details

    def keys(self, states: SubjectStates, layer: int) -> Tensor:
        """Return the keys, ``(in_features, b)``: half the clean prompt's, half the mean over the other prefixes."""
        keys = states.keys[layer]
        types = [keys[:, 0], keys[:, 1:].mean(1)] if keys.shape[1] > 1 else [keys[:, 0]]
        return torch.stack(types).mean(0).T

    def present_keys(self, requests: Sequence[EditRequest]) -> dict[int, Tensor]:
        """Return the keys of all layers under the present weights."""
        states = self.subject_states(requests, self.prefixes)
        return {layer: self.keys(states, layer) for layer in self.layers}
