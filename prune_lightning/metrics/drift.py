"""How far an edited model has moved from the unedited one: divergence of its predictions, and what a corpus sees."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

_NEAR = 20.0  # largest centred difference of logits whose exponential is summed in single precision
_CACHED = 2**18  # logits of a piece, whose dozen intermediate results stay in a processor's cache


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p_0 \,\|\, p) = \sum_v p_0(v) \log \frac{p_0(v)}{p(v)}` in nats; infinite for NaN.

    With :math:`\delta` the difference of the logits, its mean under :math:`p_0` taken out,
    :math:`\mathrm{KL} = \log(1 + \sum_v p_0(v) (e^{\delta_v} - 1 - \delta_v))`. All terms are positive, so that a small
    divergence does not drown in the rounding of log-probabilities.

    Args:
        reference: Logits of :math:`p_0`, shape ``(n, vocabulary)``.
        logits: Logits of :math:`p`, same shape.

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]]))
    tensor([0.1438])
    """
    if reference.is_cuda or reference.numel() <= _CACHED:
        return _divergence(reference, logits)
    rows = max(1, _CACHED // reference.shape[1])
    pieces = zip(reference.split(rows), logits.split(rows), strict=True)
    return torch.cat([_divergence(ours, theirs) for ours, theirs in pieces])


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    exact = torch.promote_types(reference.dtype, torch.float32)
    reference, logits = reference.to(exact), logits.to(exact)
    before = reference.softmax(-1)
    shift = logits - reference
    shift -= (before * shift).sum(-1, keepdim=True)
    found = (before * (shift.expm1() - shift)).sum(-1).log1p()
    far = shift.amax(-1) > _NEAR
    if far.any():
        ours, theirs = reference[far].log_softmax(-1), logits[far].log_softmax(-1)
        found[far] = (before[far] * (ours - theirs)).sum(-1)
    return torch.where(torch.isfinite(found), found, math.inf)


def seen_change(keys: Tensor, delta: Tensor, original: Tensor) -> Tensor:
    r"""Return :math:`\sqrt{\mathrm{tr}(\Delta C \Delta^\top) / \mathrm{tr}(W_0 C W_0^\top)}`, :math:`C = K^\top K / n`.

    It is the size of a matrix's change relative to its output, in the directions of its inputs.

    Args:
        keys: :math:`K`, inputs of the matrix, shape ``(n, in_features)``.
        delta: :math:`\Delta`, shape ``(out_features, in_features)``.
        original: :math:`W_0`, same shape.

    >>> seen_change(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 9.0]]), torch.tensor([[6.0, 1.0]]))
    tensor(0.5000)
    """
    exact = torch.promote_types(delta.dtype, torch.float32)
    keys = keys.to(exact)
    return torch.linalg.matrix_norm(keys @ delta.T.to(exact)) / torch.linalg.matrix_norm(keys @ original.T.to(exact))


class Divergence(Metric):
    r"""Mean divergence of a model's predictions from those of another, over tokens.

    ``kl`` is the mean of :math:`\mathrm{KL}(p_0 \,\|\, p)`, and infinite if a token's is not finite. ``agreement`` is
    the share of tokens with the same first choice; a token that is not finite does not agree. ``num_nonfinite`` counts
    these tokens.

    Args:
        kwargs: For :class:`torchmetrics.Metric`.

    Examples:
        >>> metric = Divergence()
        >>> metric.update(torch.tensor([0.25, math.inf]), torch.tensor([True, True]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'kl': inf, 'agreement': 0.5, 'num_nonfinite': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    agreeing: Tensor
    count: Tensor
    num_nonfinite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("agreeing", "count", "num_nonfinite"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, kl: Tensor, same: Tensor) -> None:
        """Add tokens: :func:`kl_divergence`, and whether the first choices are the same, shape ``(n,)``."""
        finite = torch.isfinite(kl)
        self.total += kl.double().sum()
        self.agreeing += (finite & same).sum()
        self.count += len(kl)
        self.num_nonfinite += (~finite).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the three figures, one scalar each."""
        return {
            "kl": self.total / self.count,
            "agreement": self.agreeing / self.count,
            "num_nonfinite": self.num_nonfinite,
        }
