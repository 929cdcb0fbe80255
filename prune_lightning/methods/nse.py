"""NSE: neuron-level sequential editing (Jiang et al., ACL 2025, https://arxiv.org/abs/2410.04045)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.costs import FP64, Cost, Shapes, StreamShape, Work
from prune_lightning.errors import UserError
from prune_lightning.methods.layerwise import LayerwiseEdit
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.models.second_moment import SecondMoment
from prune_lightning.types import EditRequest, LowRankUpdate


class NSE(LayerwiseEdit):
    r"""MEMIT with past keys for a few neurons, with values of the unedited model, repeated for what is not fitted yet.

    The values :math:`Z` are optimised on the original weights, so that earlier edits cannot distort them. A pass
    selects the requests with :math:`\alpha < \|z_i - h_i\| < \beta` and writes, layer by layer,

    .. math:: \Delta_{:,I} = R K_I^\top (\lambda C_{II} + A_{II} + K_I K_I^\top)^{-1}, \qquad
              A = \sum \tilde K \tilde K^\top

    into the columns :math:`I` of the neurons with the largest :math:`\sum_i |k_i|` over these requests. The other
    columns do not change. :math:`A` holds the keys of all requests of the earlier batches, read after their batch.

    Args:
        ridge: :math:`\lambda` (``mom2_update_weight``).
        smallest_residual: :math:`\alpha`; a request that is closer to its value is fitted. The published code compares
            the norm, the paper its square.
        largest_residual: :math:`\beta`; a request that is further away is left out of a pass, and written only if
            another write brings it into range. ``None`` for no bound.
        passes: Most passes (``max_iterations - 1`` in the published code).
        neuron_share: Share of the neurons' total score that the selected ones hold at most, in (0, 1]; 1 for all
            neurons.
        spread: ``share``; the passes need the values of the last layer.
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.

    Raises:
        UserError: A number out of range, or another ``spread``.
    """

    takes_shards: ClassVar[bool] = False  # each process decides by its own rounding which requests need a pass

    def __init__(
        self,
        *,
        ridge: float,
        smallest_residual: float = 0.0,
        largest_residual: float | None = None,
        passes: int = 2,
        neuron_share: float = 1.0,
        spread: str = "share",
        **kwargs: Any,
    ) -> None:
        if spread != "share":
            raise UserError(
                "NSE measures in every pass what is left at the last layer, so values of the first one cannot be "
                f"replayed: method.spread is expected to be 'share', but got {spread!r}"
            )
        super().__init__(**kwargs)
        if not ridge > 0 or passes < 1 or not 0 < neuron_share <= 1:
            raise UserError(
                "NSE expects `ridge` > 0, `passes` >= 1 and `neuron_share` in (0, 1], but got "
                f"{ridge}, {passes} and {neuron_share}"
            )
        self.largest_residual = float("inf") if largest_residual is None else largest_residual
        if not 0 <= smallest_residual < self.largest_residual:
            raise UserError(
                "NSE expects 0 <= `smallest_residual` < `largest_residual`, but got "
                f"{smallest_residual} and {largest_residual}"
            )
        self.ridge, self.smallest_residual = ridge, smallest_residual
        self.passes, self.neuron_share = passes, neuron_share
        self._past: dict[str, Tensor] = {}

    @classmethod
    def cost(
        cls, model: Shapes, stream: StreamShape, *, passes: int = 2, neuron_share: float = 1.0, **options: Any
    ) -> Cost:
        r"""Return the costs: the sum of past keys, and a factorisation of :math:`|I|^3/3` per layer and pass."""
        found = super().cost(model, stream, **options)
        squares = float(sum(n * n * FP64 for _, n in found.matrices))
        cubes = sum((neuron_share * n) ** 3 for _, n in found.matrices)
        solving = Work(0.0, 3 * squares, 20 * len(found.matrices), flops64=cubes * 2 / 3) * (passes / stream.batch)
        return replace(
            found,
            rank=float(passes),
            memory={**found.memory, "past keys": squares},
            peaks={**found.peaks, "solving": 3 * max(n * n * FP64 for _, n in found.matrices)},
            per_edit={**found.per_edit, "keys": found.per_edit["keys"] * (passes + 1), "solving": solving},
        )

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return one update per layer, of the rank of all requests written in all passes; none if none is written."""
        with self.unedited():
            values = self.optimise(requests, self.value_sites()[0])
        written: dict[str, LowRankUpdate] = {}
        residuals: list[list[float]] = [[] for _ in requests]
        passes = [0] * len(requests)
        with self.provisional():
            for _ in range(self.passes):
                norms = self._residuals(requests, values.target)
                # NaN is in range, so that the update is not finite and is refused.
                low, high = self.smallest_residual, self.largest_residual
                active = [i for i, x in enumerate(norms) if not (x <= low or x >= high)]
                for i, norm in enumerate(norms):
                    residuals[i].append(norm)
                    passes[i] += i in active
                if not active:
                    break
                chosen = [requests[i] for i in active]
                found = self.solve_layers(chosen, values.target[active], written)
                for name, update in found.items():
                    written[name] = LowRankUpdate.sum([*([written[name]] if name in written else []), update])
                    self.edited_matrices()[name].add_provisionally(written[name])
        own = [{"residuals": of, "passes": count} for of, count in zip(residuals, passes, strict=True)]
        return written, [{**detail, **more} for detail, more in zip(values.details, own, strict=True)]

    def _residuals(self, requests: Sequence[EditRequest], target: Tensor) -> list[float]:
        r"""Return :math:`\|z_i - h_i\|` of each request under the present weights."""
        clean = self.walk(requests, self.prefixes[:1], until=self.layers[-1])
        clean.keys(self.layers[0])
        assert clean.hidden is not None
        norms: list[float] = (target.double() - clean.hidden).norm(dim=1).tolist()
        return norms

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Solve for the selected neurons; the factor of the other columns is zero."""
        neurons = largest_scores(keys.abs().sum(1), self.neuron_share)
        system = self.ridge * self.moments[layer].positive()[neurons[:, None], neurons]
        if str(layer) in self._past:
            system = system + self._past[str(layer)][neurons[:, None], neurons]
        selected = keys[neurons]
        part = regression_update(residual, selected, SecondMoment(system).solve(selected), damping=1.0)
        right = torch.zeros_like(keys)
        right[neurons] = part.right
        return LowRankUpdate(part.left, right)

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the keys of the batch."""
        return self.present_keys(requests)

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Add the keys of a batch to their sum of squares."""
        for layer, keys in observed.items():
            known = self._past.get(layer)
            self._past[layer] = keys @ keys.T if known is None else known.addmm_(keys, keys.T)

    def memory(self) -> Mapping[str, Tensor]:
        r"""Return :math:`A`, by layer."""
        return self._past

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        r"""Replace :math:`A`."""
        self._past = {layer: sums.clone() for layer, sums in memory.items()}

    def forget(self) -> None:
        """Remove all past keys."""
        self._past = {}


def largest_scores(score: Tensor, share: float) -> Tensor:
    """Return the indices of the largest scores, as many as hold at most a share of the total, at least one.

    (The published code. The paper takes the fewest that hold at least the share: one more, unless the sum fits.)

    Args:
        score: Nonnegative, shape ``(n,)``.
        share: In (0, 1].

    >>> largest_scores(torch.tensor([1.0, 5.0, 2.0]), share=0.9)
    tensor([1, 2])
    """
    order = score.argsort(descending=True, stable=True)
    if share >= 1:  # the rounding of the sum must not cost a neuron
        return order
    count = int((score[order].cumsum(0) <= share * score.sum()).sum())
    return order[: max(1, count)]
