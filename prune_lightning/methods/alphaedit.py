"""AlphaEdit: null-space constrained editing (Fang et al., ICLR 2025, https://arxiv.org/abs/2410.02355)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.costs import protecting
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.methods.protected_keys import KeyProtectingEdit
from prune_lightning.ranges import Count, NonNegative, Positive
from prune_lightning.types import LowRankUpdate

MUCH = 0.2  # share of the energy of the preserved keys


class AlphaEdit(KeyProtectingEdit):
    r"""Write only into the null space of the preserved knowledge, and protect earlier edits:

    .. math:: \Delta = R K^\top P\,(K K^\top P + A P + \rho I)^{-1}, \qquad A = \sum \tilde K \tilde K^\top

    with :math:`P` the projector onto the eigenvectors of :math:`C` whose eigenvalues are below :math:`\tau`, and
    :math:`\tilde K` the keys of the earlier batches as they were after their batch. Computed recursively: from
    :math:`Q = P/\rho`, :math:`\Delta = R\,(I + K^\top Q K)^{-1} K^\top Q`, then :math:`Q` is updated with :math:`\tilde
    K`.

    Two options are BetaEdit's. ``preserve``, :math:`\lambda_1`, also keeps the preserved knowledge inside the null
    space: the bracket becomes :math:`P\,(K K^\top + A + \lambda_1 C) + \rho I`. Every ``refresh_every`` edits,
    :math:`P` is found again from the eigenvalues of :math:`(A/t + \lambda_1 C)/(1 + \lambda_1)`, after :math:`t` edits.
    With the published :math:`\lambda_1` that hardly changes it.

    Args:
        null_threshold: :math:`\tau`, in the units of :math:`C`; the projector's rank depends on it and on the
            statistics, and is reported (``facts``).
        ridge: :math:`\rho` (``L2``).
        preserve: :math:`\lambda_1`; BetaEdit has 3000.
        refresh_every: Edits between two searches for the null space; ``None`` for one search. Needs ``preserve``.
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.

    Raises:
        UserError: A number out of range, or ``refresh_every`` without ``preserve``.
    """

    def __init__(
        self,
        *,
        null_threshold: Positive = 0.02,
        ridge: Positive = 10.0,
        preserve: NonNegative = 0.0,
        refresh_every: Count | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (null_threshold > 0 and ridge > 0):
            raise UserError(
                f"AlphaEdit expects a positive `null_threshold` and `ridge`, but got {null_threshold} and {ridge}"
            )
        if preserve < 0 or (refresh_every is not None and refresh_every < 1):
            raise UserError(
                "AlphaEdit expects `preserve` not to be negative and `refresh_every` to be at least 1, but got "
                f"{preserve} and {refresh_every}"
            )
        if refresh_every is not None and not preserve:
            raise UserError(
                "AlphaEdit's method.refresh_every needs method.preserve, without which the new null space would be "
                "found from past keys alone: set method.preserve (BetaEdit has 3000)"
            )
        self.null_threshold, self.ridge = null_threshold, ridge
        self.preserve, self.refresh_every = preserve, refresh_every
        self._null: dict[int, Tensor] = {}
        self._past: dict[str, Tensor] = {}  # A by the layer's number, if it is needed to find the null space again
        self._edits = 0

    @classmethod
    def cost(cls, model: Shapes, stream: StreamShape, *, refresh_every: int | None = None, **options: Any) -> Cost:
        """Return the costs: a growing inverse and the basis of the null space per layer, and the sum of past keys."""
        keep, found = options["second_moments"].keep, super().cost(model, stream, **options)
        return protecting(found, 3 if refresh_every else 2, stream.batch, keep)

    @property
    def builds_on_earlier(self) -> str | None:
        """``refresh_every``."""
        return None if self.refresh_every is None else "refresh_every builds on the keys of earlier edits"

    def prepare(self) -> None:
        """Find the null space of each layer."""
        super().prepare()
        for layer in self.layers:
            self._find_null_space(layer, self.moments[layer].matrix)
        energy = {layer: self.facts[f"projector_energy/{layer}"] for layer in self.layers}
        if much := [layer for layer, share in energy.items() if share > MUCH]:
            rank_zero_warn(
                f"AlphaEdit's null space has up to {max(energy.values()):.0%} of the energy of the preserved keys "
                f"(layers {', '.join(map(str, much))}), so that little is preserved: "
                f"method.null_threshold={self.null_threshold:g} is too high for this model"
            )
        self.forget()

    def _find_null_space(self, layer: int, moment: Tensor) -> None:
        """Keep the basis of a layer's null space, and its dimension and share of the energy among the facts."""
        values, vectors = torch.linalg.eigh(moment)
        # An eigenvalue at the threshold is not below it, whatever its rounding.
        rounding = 64 * torch.finfo(values.dtype).eps * values.max()
        inside = values < self.null_threshold - rounding
        null = vectors[:, inside]
        if not null.shape[1]:
            raise UserError(
                f"AlphaEdit finds no null space at layer {layer}: no eigenvalue of the second moment is below "
                f"method.null_threshold={self.null_threshold}; the smallest is {float(values.min()):.3g}"
            )
        self._null[layer] = self.second_moments.keep.place(null)
        self.facts[f"projector_rank/{layer}"] = null.shape[1]
        self.facts[f"projector_energy/{layer}"] = float(values[inside].clamp_min(0).sum() / values.clamp_min(0).sum())

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Solve the ``b x b`` system."""
        return regression_update(residual, keys, self.protected[layer].solve(keys), damping=1.0)

    def unprotected_inverse(self, layer: int) -> Tensor:
        r"""Return :math:`N (\lambda_1 N^\top C N + \rho I)^{-1} N^\top` with :math:`P = N N^\top`."""
        null = self._null_space(layer)
        if not self.preserve:
            return null @ null.T / self.ridge
        return self._inverse_inside(null, self.preserve * self.moments[layer].positive())

    def _null_space(self, layer: int) -> Tensor:
        return self._null[layer].to(self.language_model.device, torch.float64)

    def _inverse_inside(self, null: Tensor, bracket: Tensor) -> Tensor:
        inside = null.T @ bracket @ null
        inside.diagonal().add_(self.ridge)
        return null @ torch.linalg.solve(inside, null.T)

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Protect the keys of a batch, and find the null space again if it is time."""
        super().remember(observed)
        if self.refresh_every is None or not observed:
            return
        for layer, keys in observed.items():
            self._past[layer] = self._past.get(layer, 0) + keys @ keys.T
        before, self._edits = self._edits, self._edits + next(iter(observed.values())).shape[1]
        if before // self.refresh_every != self._edits // self.refresh_every:
            for edited in self.layers:
                self._refresh(edited)

    def _refresh(self, layer: int) -> None:
        past, moment, weight = self._past[str(layer)], self.moments[layer], self.preserve
        self._find_null_space(layer, (past / self._edits + weight * moment.matrix) / (1 + weight))
        inverse = self._inverse_inside(self._null_space(layer), past + weight * moment.positive())
        self.protected.load_state_dict({**self.protected.state_dict(), str(layer): inverse})

    def memory(self) -> Mapping[str, Tensor]:
        """Return the inverses, by layer, and what a refresh needs."""
        if self.refresh_every is None:
            return super().memory()
        past = {f"past.{layer}": tensor for layer, tensor in self._past.items()}
        return {**super().memory(), **past, "edits": torch.tensor(self._edits)}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Replace the inverses and the sum of past keys."""
        self._past = {name.removeprefix("past."): t.clone() for name, t in memory.items() if name.startswith("past.")}
        self._edits = int(memory.get("edits", 0))
        super().load_memory({name: tensor for name, tensor in memory.items() if name.isdigit()})

    def forget(self) -> None:
        """Remove all protected keys, and return to the null space of the unedited model."""
        super().forget()
        if self.refresh_every is not None and self._edits >= self.refresh_every:
            for layer in self.layers:
                self._find_null_space(layer, self.moments[layer].matrix)
        self._past, self._edits = {}, 0
