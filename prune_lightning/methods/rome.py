"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, https://arxiv.org/abs/2202.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.types import EditRequest, LowRankUpdate

WINDOW = 16  # requests of the stream whose keys are computed in one pass


class ROME(LocateThenEdit):
    r"""Insert one key-value pair with the least change to all others (eq. 2):

    .. math:: \Delta = \frac{(v^* - W k)\, u^\top}{u^\top k}, \qquad
              u = \frac{C^{-1} \bar k}{\lVert C^{-1} \bar k \rVert}

    with :math:`\bar k` the mean key over all prefixes and :math:`k` the key of the clean prompt, as published. The
    denominator can be close to zero or negative, and then the update explodes; :class:`~.r_rome.RROME` fixes this. The
    requests of a batch, and several layers, are edited one after another. Edits do not change the keys of the first
    edited layer, so these are computed for many requests of the stream in one pass.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._chosen: dict[EditRequest, tuple[Tensor, Tensor]] = {}

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return one rank-one update per request and layer, concatenated."""
        updates: dict[str, list[LowRankUpdate]] = {name: [] for name in self.edited_matrices()}
        details: list[dict[str, Any]] = []
        with self.provisional():
            for request in requests:
                keys: list[dict[str, float]] = []
                for layer, (name, matrix) in zip(self.layers, self.edited_matrices().items(), strict=True):
                    values = self.optimise([request], ShiftSite(layer, "mlp"))
                    update, key = self._rank_one(request, layer, values.target[0], matrix)
                    updates[name].append(update)
                    keys.append(key)
                    matrix.add_provisionally(LowRankUpdate.sum(updates[name]))
                details.append(values.details[0] | min(keys, key=lambda key: key["key_ratio"]))
        return {name: LowRankUpdate.sum(parts) for name, parts in updates.items()}, details

    def _rank_one(
        self, request: EditRequest, layer: int, target: Tensor, matrix: EditedMatrix
    ) -> tuple[LowRankUpdate, dict[str, float]]:
        r"""Return the update of one layer, and figures of how well posed it is.

        ``key_cosine`` is :math:`u^\top k / \lVert k \rVert`; ``key_ratio`` is :math:`u^\top k / u^\top \bar k`, which
        is 1 if both keys are equal. The update's norm is 1/``key_ratio`` times R-ROME's.
        """
        whitened, written = self._keys(request, layer)
        direction = self.moments[layer].solve(whitened[:, None])
        direction = direction / direction.norm()
        output = self.language_model.rewrite_output(layer, written).double()
        output = output + matrix.withheld_on(written.double()[:, None])[:, 0]
        denominator = written @ direction[:, 0]
        left = (target.double() - output)[:, None] / denominator
        key = {
            "key_cosine": float(denominator / written.norm()),
            "key_ratio": float(denominator / (whitened @ direction[:, 0])),
        }
        return LowRankUpdate(left, direction), key

    def _keys(self, request: EditRequest, layer: int) -> tuple[Tensor, Tensor]:
        if layer != self.layers[0]:
            return self.choose(self.subject_keys([request], [layer])[layer][0])
        if request not in self._chosen:
            requests = self.stream_window(request, WINDOW)
            keys = self.subject_keys(requests, [layer])[layer]
            self._chosen = {one: self.choose(of_one) for one, of_one in zip(requests, keys, strict=True)}
        return self._chosen[request]

    def choose(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        r"""Choose the key that gives the direction :math:`u`, and the one to map to the value.

        Args:
            keys: Keys under every prefix, the clean prompt first, shape ``(c, in_features)``.
        """
        return keys.mean(0), keys[0]
