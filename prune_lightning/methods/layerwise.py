"""Shared by MEMIT, EMMET and AlphaEdit: value targets at the last layer, spread over the layers from below."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.errors import one_of
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.prompts import key_row
from prune_lightning.methods.value import Values
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.hooks import capture, edit_output
from prune_lightning.types import EditRequest, LowRankUpdate


class LayerwiseEdit(LocateThenEdit):
    r"""Base of the batch methods. Subclasses compute the update of one layer from its keys and residuals.

    The values :math:`Z` are optimised at the last layer's output, on the model before the batch. Then the layers are
    edited from below, each with the lower ones already edited. :math:`\Delta_l` maps the keys :math:`K_l` to

    .. math:: R_l = (Z - H)/(q - l + 1),

    the residual of the present hidden states, divided among the remaining layers, and by the constant by which the
    architecture multiplies the MLP's output, if there is one. Under a restraint with feedback, what it withholds on
    :math:`K_l` is subtracted from :math:`R_l`, so that the sum of the updates is the one that the values would have
    given without a restraint. That is exact with one layer; with several, each layer answers for its own share only.

    With ``spread=replay`` (FE in EasyEdit) the values are optimised at the first layer's output. One forward pass with
    the shifts in place gives the hidden states :math:`Z_l` that they lead to at every layer, and each layer gets the
    whole of :math:`R_l = Z_l - H_l`.

    Args:
        spread: ``share`` the residual of the last layer, or ``replay`` the values of the first.
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.
    """

    one_by_one: ClassVar[bool] = False

    def __init__(self, *, spread: str = "share", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of("method.spread", spread, ("share", "replay"))
        self.spread = spread

    def value_sites(self) -> list[ShiftSite]:
        """Return the last edited block, or the first one of which the values are replayed."""
        return [ShiftSite(self.layers[-1 if self.spread == "share" else 0], "block")]

    @abstractmethod
    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Return the update of one layer.

        Args:
            layer: Index of the layer.
            keys: :math:`K`, shape ``(in_features, b)``, fp64.
            residual: :math:`R`, shape ``(out_features, b)``, fp64.
        """

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return one update of rank ``b`` per layer."""
        values = self.optimise(requests, self.value_sites()[0])
        replayed = self._replayed(requests, values) if self.spread == "replay" else {}
        with self.provisional():
            return self.solve_layers(requests, values.target, {}, replayed), values.details

    def solve_layers(
        self,
        requests: Sequence[EditRequest],
        target: Tensor,
        earlier: Mapping[str, LowRankUpdate],
        replayed: Mapping[int, Tensor] | None = None,
    ) -> dict[str, LowRankUpdate]:
        """Return the update of every layer, each solved with those of the layers below in place.

        Call it inside :meth:`~.base.EditingModule.provisional`: all layers but the last are written.

        Args:
            requests: ``b`` requests.
            target: :math:`Z`, shape ``(b, width)``, at the last layer.
            earlier: What this step has written into the layers already, by the name of the weight.
            replayed: :math:`Z_l` of every layer, by its number; ``None`` to share the residual of the last layer.
        """
        clean = self.walk(requests, self.prefixes[:1], until=self.layers[-1])
        prefixed = self.walk(requests, self.prefixes[1:]) if len(self.prefixes) > 1 else None
        updates: dict[str, LowRankUpdate] = {}
        multiplier = self.language_model.multiplier
        for position, (layer, (name, matrix)) in enumerate(
            zip(self.layers, self.edited_matrices().items(), strict=True)
        ):
            keys = clean.keys(layer, until=layer if replayed else None)
            if prefixed is not None:
                keys = mixed(keys, prefixed.keys(layer).view(len(requests), -1, keys.shape[1]))
            assert clean.hidden is not None
            wanted = replayed[layer] if replayed else target.double()
            parts = 1 if replayed else len(self.layers) - position
            residual = (wanted - clean.hidden).T / parts / multiplier
            updates[name] = self.solve(layer, keys.T, residual - matrix.withheld_on(keys.T))
            if layer != self.layers[-1]:  # nothing is read after the last one
                known = [earlier[name]] if name in earlier else []
                matrix.add_provisionally(LowRankUpdate.sum([*known, updates[name]]))
        return updates

    @torch.no_grad()
    def _replayed(self, requests: Sequence[EditRequest], values: Values) -> dict[int, Tensor]:
        """Return the hidden states to which the first layer's shifts lead at each layer, ``(b, width)``, fp64."""
        model, shift = self.language_model, values.target - values.reference
        rows = [key_row(model, request, self.prefixes[0]) for request in requests]
        ids, mask = model.tokens.pad([row.ids for row in rows], model.device)
        at = torch.arange(len(rows), device=model.device), torch.tensor([row.subject for row in rows]).to(model.device)

        def add(output: Tensor) -> Tensor:
            return output.index_put(at, shift.to(output), accumulate=True)

        blocks = [model.block(layer) for layer in self.layers]
        with edit_output(blocks[0], add, len(rows)), capture(outputs=blocks, rows=len(rows)) as seen:
            model(ids, mask)
        return {layer: seen.outputs[i][at].double() for i, layer in enumerate(self.layers)}

    def present_keys(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """Return, by the layer's number, the keys under the present weights, each ``(in_features, b)``.

        A key that is not finite, as in a model that has broken down, is zero: there is nothing to protect.
        """
        keys = {layer: mixed(of[:, 0], of[:, 1:]).T for layer, of in self.subject_keys(requests).items()}
        return {str(layer): torch.where(torch.isfinite(of).all(0), of, 0.0) for layer, of in keys.items()}


def mixed(clean: Tensor, prefixed: Tensor) -> Tensor:
    """Return half the clean prompt's key and half the mean over the prefixed ones, ``(b, in_features)``.

    Args:
        clean: Shape ``(b, in_features)``.
        prefixed: Shape ``(b, prefixes, in_features)``; ``prefixes`` may be zero.
    """
    return (clean + prefixed.mean(1)) / 2 if prefixed.shape[1] else clean
