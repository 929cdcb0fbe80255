"""MEMIT: mass editing of memory (Meng et al., ICLR 2023, https://arxiv.org/abs/2210.07229)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.methods.locate_then_edit import LocateThenEdit, SubjectStates
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.statistics import SecondMoment
from prune_lightning.types import EditRequest, WeightUpdate


class MEMIT(LocateThenEdit):
    r"""Spread a batch of edits over several layers, each by ridge regression against the second moment (eq. 14):

    .. math:: \Delta_l = R_l K^\top (\lambda C + K K^\top)^{-1} = R_l (\lambda I + K^\top C^{-1} K)^{-1} K^\top C^{-1}

    with the residual :math:`R_l = (Z - H)/(q - l + 1)` of the value targets against the present hidden states, shared
    out over the layers that are still to come. The right-hand form needs one ``b x b`` system per layer.

    Args:
        ridge: :math:`\lambda`, the weight of the second moment (``mom2_update_weight``).
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.
    """

    def __init__(self, *, ridge: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ridge > 0:
            raise UserError(f"MEMIT's `ridge` is expected to be positive, but got {ridge}")
        self.ridge = ridge

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, WeightUpdate], list[dict[str, Any]]]:
        """Return one update of rank ``b`` per layer; each layer sees the ones below it already edited."""
        values = self.optimise(requests, ShiftSite(self.layers[-1], "block"))
        updates: dict[str, WeightUpdate] = {}
        with self.provisional():
            for position, (layer, (name, matrix)) in enumerate(
                zip(self.layers, self.edited_matrices().items(), strict=True)
            ):
                states = self.subject_states(requests, self.prefixes, [layer])
                residual = (values.target.double() - states.hidden[:, 0]).T / (len(self.layers) - position)
                updates[name] = self.solve(self.keys(states, layer), residual, self.moments[layer])
                matrix.add_provisionally(updates[name])
        return updates, values.details

    def keys(self, states: SubjectStates, layer: int) -> Tensor:
        """Return the keys, ``(in_features, b)``: half the clean prompt's, half the mean over the other prefixes."""
        keys = states.keys[layer]
        types = [keys[:, 0], keys[:, 1:].mean(1)] if keys.shape[1] > 1 else [keys[:, 0]]
        return torch.stack(types).mean(0).T

    def solve(self, keys: Tensor, residual: Tensor, moment: SecondMoment) -> WeightUpdate:
        r"""Return :math:`R (\lambda I + K^\top C^{-1} K)^{-1} (C^{-1} K)^\top` in factors.

        Args:
            keys: :math:`K`, shape ``(in_features, b)``.
            residual: :math:`R`, shape ``(out_features, b)``.
            moment: :math:`C`.
        """
        whitened = moment.solve(keys)
        system = keys.T @ whitened
        system.diagonal().add_(self.ridge)
        return WeightUpdate(residual, torch.linalg.solve(system, whitened.T).T)
