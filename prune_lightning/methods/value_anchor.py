"""Norm anchors: keep the norm of solved values at that of an unedited model (NAS, https://arxiv.org/abs/2602.02543)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from prune_lightning.methods.value import Values

ANCHORS = ("none", "mean", "own", "cap")
_KEPT = 0.95  # share of the pilot norms, the smallest ones, whose mean is the anchor


def mean_norm(values: Sequence[Tensor]) -> float:
    """Return the mean norm of values ``(width,)``, without the largest twentieth; NaN if none is finite."""
    norms = sorted(norm for value in values if math.isfinite(norm := float(value.double().norm())))
    kept = norms[: math.ceil(_KEPT * len(norms))]
    return sum(kept) / len(kept) if kept else math.nan


def written_values(values: Values, outputs: Tensor, multiplier: float) -> Tensor:
    r"""Return :math:`v^* = v_0 + \delta`, what the matrix is asked to return, ``(b, width)``, fp64.

    Args:
        values: Solved values; the shift may be that of a block's output.
        outputs: :math:`v_0`, the present output of the edited matrix, ``(b, width)``.
        multiplier: Factor of the matrix's output before the residual addition, by which the shift is divided.
    """
    return outputs.double() + (values.target - values.reference).double() / multiplier


def rescaled(values: Values, written: Tensor, anchor: Tensor, kind: str, multiplier: float) -> Values:
    r"""Return the values with :math:`v^* \leftarrow a\,v^* / \lVert v^* \rVert`, and the ratio of the norms.

    ``norm_ratio``, :math:`\lVert v^* \rVert / a` before, is added to the details. Its growth announces a collapse.

    Args:
        values: Solved values.
        written: Their :func:`written_values`.
        anchor: :math:`a` of each value, shape ``(b,)``.
        kind: ``none`` leaves the values alone, ``cap`` the smaller ones.
        multiplier: See :func:`written_values`.
    """
    ratio = written.norm(dim=1) / anchor
    details = [{**detail, "norm_ratio": of} for detail, of in zip(values.details, ratio.tolist(), strict=True)]
    if kind == "none":
        return replace(values, details=details)
    factor = 1 / (ratio.clamp_min(1) if kind == "cap" else ratio)
    target = values.target + (multiplier * (factor - 1)[:, None] * written).to(values.target)
    return replace(values, target=target, details=details)
