"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, https://arxiv.org/abs/2202.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.types import EditRequest, WeightUpdate


class ROME(LocateThenEdit):
    r"""Insert one key-value pair at the cost of least change to all others (eq. 2):

    .. math:: \Delta = \frac{(v^* - W k)\, u^\top}{u^\top k}, \qquad
              u = \frac{C^{-1} \bar k}{\lVert C^{-1} \bar k \rVert}

    with :math:`\bar k` the mean key over all prefixes and :math:`k` the key of the clean prompt, as published. The
    denominator can come close to zero, or be negative, which blows the update up; :class:`~.r_rome.RROME` mends that.
    Several requests of a batch, and several layers, are written one after another.
    """

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, WeightUpdate], list[dict[str, Any]]]:
        """Return one rank-one update per request and layer, side by side."""
        updates: dict[str, list[WeightUpdate]] = {name: [] for name in self.edited_matrices()}
        details: list[dict[str, Any]] = []
        with self.provisional():
            for request in requests:
                for layer, (name, matrix) in zip(self.layers, self.edited_matrices().items(), strict=True):
                    values = self.optimise([request], ShiftSite(layer, "mlp"))
                    update = self._rank_one(request, layer, values.target[0])
                    updates[name].append(update)
                    matrix.add_provisionally(WeightUpdate.sum(updates[name]))
                details.append(values.details[0])
        return {name: WeightUpdate.sum(parts) for name, parts in updates.items()}, details

    def _rank_one(self, request: EditRequest, layer: int, target: Tensor) -> WeightUpdate:
        states = self.subject_states([request], self.prefixes, [layer])
        keys, outputs = states.keys[layer][0], states.outputs[layer][0]
        direction = self.moments[layer].solve(keys.mean(0)[:, None])
        direction = direction / direction.norm()
        key, output = self.key_and_output(keys, outputs)
        left = (target.double() - output)[:, None] / (key @ direction[:, 0])
        return WeightUpdate(left, direction)

    def key_and_output(self, keys: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the key that the update must map to the value, and its present output.

        Args:
            keys: Keys under every prefix, the clean prompt first, shape ``(c, in_features)``.
            outputs: Outputs of the edited module there, shape ``(c, out_features)``.
        """
        return keys[0], outputs[0]
