"""MEMIT: mass editing of memory (Meng et al., ICLR 2023, https://arxiv.org/abs/2210.07229)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError
from prune_lightning.methods.costs import protecting
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.methods.protected_keys import KeyProtectingEdit
from prune_lightning.ranges import NonNegative, Positive
from prune_lightning.types import EditRequest, LowRankUpdate


class MEMIT(KeyProtectingEdit):
    r"""Ridge regression against the second moment (eq. 14):

    .. math:: \Delta = R K^\top (\lambda C + K K^\top)^{-1} = R\,(\lambda I + K^\top C^{-1} K)^{-1} K^\top C^{-1}

    With a norm penalty :math:`\lambda_n` the bracket is :math:`\lambda C + \lambda_n I + K K^\top` (ENCORE).

    Args:
        ridge: :math:`\lambda`, the weight of the second moment (``mom2_update_weight``).
        accumulate_past_keys: Protect earlier edits: add :math:`\sum \tilde K \tilde K^\top` over the keys of all
            batches so far, read after their batch was written ("MEMIT-seq" in AlphaEdit's comparison).
        norm_penalty: :math:`\lambda_n`, the weight of :math:`\lVert\Delta\rVert_F^2`.
        kwargs: See :class:`~.locate_then_edit.LocateThenEdit`.
    """

    def __init__(
        self, *, ridge: Positive, accumulate_past_keys: bool = False, norm_penalty: NonNegative = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if norm_penalty < 0:
            raise UserError(f"MEMIT's `norm_penalty` is expected not to be negative, but got {norm_penalty}")
        if not ridge > 0:
            raise UserError(f"MEMIT's `ridge` is expected to be positive, but got {ridge}")
        self.ridge, self.accumulate_past_keys, self.norm_penalty = ridge, accumulate_past_keys, norm_penalty

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        accumulate_past_keys: bool = False,
        norm_penalty: float = 0.0,
        **options: Any,
    ) -> Cost:
        """Return the costs; with past keys or a norm penalty, there is an inverse per layer."""
        found = super().cost(model, stream, **options)
        keep = options["second_moments"].keep
        return protecting(found, 1, stream.batch, keep) if accumulate_past_keys or norm_penalty else found

    def solve(self, layer: int, keys: Tensor, residual: Tensor) -> LowRankUpdate:
        """Solve the ``b x b`` system."""
        if self.norm_penalty or layer in self.protected:
            return regression_update(residual, keys, self.protected[layer].solve(keys), damping=1.0)
        return regression_update(residual, keys, self.moments[layer].solve(keys), damping=self.ridge)

    @property
    def builds_on_earlier(self) -> str | None:
        """``accumulate_past_keys``."""
        return "accumulate_past_keys=true builds on the keys of earlier edits" if self.accumulate_past_keys else None

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return the keys of the batch, if past keys are to be protected."""
        return super().observe(requests) if self.accumulate_past_keys else {}

    def unprotected_inverse(self, layer: int) -> Tensor:
        r"""Return :math:`(\lambda C + \lambda_n I)^{-1}`."""
        if not self.norm_penalty:
            return self.moments[layer].inverse() / self.ridge
        bracket = self.ridge * self.moments[layer].positive()
        bracket.diagonal().add_(self.norm_penalty)
        return torch.cholesky_inverse(torch.linalg.cholesky(bracket))
