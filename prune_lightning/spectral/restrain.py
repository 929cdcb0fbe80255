r"""Apply a restraint law to the singular values of a matrix: :math:`U F(\Sigma) V^\top`, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.spectral.accumulated import AccumulatedChange
from prune_lightning.spectral.diagnostics import sigma_max
from prune_lightning.spectral.laws import RestraintLaw
from prune_lightning.spectral.triplets import triplets_above
from prune_lightning.types import WeightUpdate


@dataclass(frozen=True)
class Excess:
    r"""What a law takes away from a change: :math:`U F(\Sigma) V^\top = \Delta - A B^\top`.

    Args:
        correction: :math:`A B^\top` in factors; ``None`` where nothing is taken away.
        num_above: Number of singular values above the reference.
        sigma_before: Largest singular value before; under ``certificate`` an upper bound.
        path: How it was found; see :class:`~prune_lightning.spectral.triplets.Triplets`.
    """

    correction: WeightUpdate | None
    num_above: int
    sigma_before: float
    path: str


def excess(change: Tensor | AccumulatedChange, law: RestraintLaw, reference: float) -> Excess:
    r"""Return what a law takes away from a change.

    Only the triplets :math:`J` above the reference change, so

    .. math:: U F(\Sigma) V^\top = \Delta - U_J \operatorname{diag}(\sigma_J - F(\sigma_J))\, V_J^\top .

    Args:
        change: :math:`\Delta`.
        law: The law :math:`F`.
        reference: :math:`\bar s > 0`, the largest singular value of the original matrix.

    Raises:
        UserError: The change holds NaN or infinity, or the reference is not positive.
    """
    above = change.triplets_above if isinstance(change, AccumulatedChange) else lambda t: triplets_above(change, t)
    triplets = above(reference)
    correction = None
    if len(triplets.sigma):
        surplus = triplets.sigma - law(triplets.sigma, reference)
        moved = surplus != 0
        if moved.any():
            correction = WeightUpdate(triplets.left[:, moved] * surplus[moved], triplets.right[:, moved])
    return Excess(correction, len(triplets.sigma), triplets.largest, triplets.path)


@torch.no_grad()
def restrained(delta: Tensor, law: RestraintLaw, reference: float) -> Tensor:
    r"""Return :math:`U F(\Sigma) V^\top` of a dense change; the same object if nothing has to change.

    >>> from prune_lightning.spectral.laws import HardClip
    >>> restrained(torch.diag(torch.tensor([9.0, 1.0])), HardClip(), reference=4.0)
    tensor([[4., 0.],
            [0., 1.]])
    """
    correction = excess(delta, law, reference).correction
    return delta if correction is None else (delta.double() - correction.dense()).to(delta.dtype)


@torch.no_grad()
def restrain_(parameter: Tensor, original: Tensor, law: RestraintLaw, reference: float | None = None) -> Excess:
    r"""Restrain in place what a weight has moved by since ``original``: :math:`W \leftarrow W_0 + U F(\Sigma) V^\top`.

    For training loops of any kind; under Lightning the ``PRUNE`` callback does more.

    Args:
        parameter: :math:`W`, two-dimensional; its orientation does not matter.
        original: :math:`W_0`, a copy taken before training.
        law: The law.
        reference: :math:`\sigma_{\max}(W_0)`, if it is known; computed otherwise.

    Returns:
        What was taken away.

    >>> from prune_lightning.spectral.laws import HardClip
    >>> weight, original = torch.diag(torch.tensor([9.0, 1.0])), torch.zeros(2, 2)
    >>> restrain_(weight, original, HardClip(), reference=4.0).num_above
    1
    >>> weight
    tensor([[4., 0.],
            [0., 1.]])
    """
    precise = torch.promote_types(parameter.dtype, torch.float32)
    delta = parameter.detach().to(precise) - original.to(precise)
    found = excess(delta, law, sigma_max(original) if reference is None else reference)
    if found.correction is not None:
        change = found.correction.dense()
        parameter.copy_((parameter.double() - change).to(parameter.dtype))
    return found
