r"""Apply a restraint law to the singular values of a matrix: :math:`U F(\Sigma) V^\top`, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prune_lightning.devices import chosen
from prune_lightning.errors import UserError
from prune_lightning.spectral.accumulated import AccumulatedChange
from prune_lightning.spectral.diagnostics import sigma_max
from prune_lightning.spectral.factored import FactoredMatrix
from prune_lightning.spectral.laws import RestraintLaw
from prune_lightning.spectral.triplets import fp64, triplets_above
from prune_lightning.types import LowRankUpdate


@dataclass(frozen=True)
class SpectralCorrection:
    r"""The correction of a change by a law: :math:`U F(\Sigma) V^\top = \Delta - A B^\top`.

    Args:
        correction: :math:`A B^\top` in factors; ``None`` if it is zero.
        num_above: Number of singular values above the reference.
        sigma_before: Largest singular value before; under ``certificate`` an upper bound.
        path: How it was found; see :class:`~prune_lightning.spectral.triplets.Triplets`.
    """

    correction: LowRankUpdate | None
    num_above: int
    sigma_before: float
    path: str

    @property
    def num_changed(self) -> int:
        """Number of singular values that the law changed, at most ``num_above``."""
        return 0 if self.correction is None else self.correction.left.shape[1]


def spectral_correction(
    change: Tensor | AccumulatedChange | FactoredMatrix, law: RestraintLaw, reference: float
) -> SpectralCorrection:
    r"""Return what a law takes away from a change.

    Only the triplets :math:`J` above the reference change, so

    .. math:: U F(\Sigma) V^\top = \Delta - U_J \operatorname{diag}(\sigma_J - F(\sigma_J))\, V_J^\top .

    Args:
        change: :math:`\Delta`.
        law: The law :math:`F`.
        reference: :math:`\bar s > 0`, the largest singular value of the original matrix.

    Raises:
        NonFiniteChange: The change holds NaN or infinity.
        UserError: The reference is not positive, or the law does not return one finite value for each singular value.
    """
    triplets = triplets_above(change, reference) if isinstance(change, Tensor) else change.triplets_above(reference)
    correction = None
    if len(triplets.sigma):
        becomes = law(triplets.sigma, reference)
        count = _num_moved(triplets.sigma, becomes)
        if count is None:
            raise UserError(f"the law {law!r} did not return one finite value for each singular value")
        if count:
            surplus = triplets.sigma - becomes
            moved = chosen(surplus != 0, count)
            correction = LowRankUpdate(triplets.left[:, moved] * surplus[moved], triplets.right[:, moved])
    return SpectralCorrection(correction, len(triplets.sigma), triplets.largest, triplets.path)


def _num_moved(sigma: Tensor, becomes: Tensor) -> int | None:
    """Return how many values a law changes, or ``None`` if it does not return one finite value for each."""
    if becomes.shape != sigma.shape:
        return None
    finite, count = torch.stack([torch.isfinite(becomes).all().long(), (becomes != sigma).sum()]).tolist()
    return count if finite else None


@torch.no_grad()
def restrained(delta: Tensor, law: RestraintLaw, reference: float) -> Tensor:
    r"""Return :math:`U F(\Sigma) V^\top` of a dense change; the same object if nothing changes.

    >>> from prune_lightning.spectral.laws import HardClip
    >>> restrained(torch.diag(torch.tensor([9.0, 1.0])), HardClip(), reference=4.0)
    tensor([[4., 0.],
            [0., 1.]])
    """
    correction = spectral_correction(delta, law, reference).correction
    return delta if correction is None else (fp64(delta) - correction.dense()).to(delta)


@torch.no_grad()
def restrain_(
    parameter: Tensor, original: Tensor, law: RestraintLaw, reference: float | None = None
) -> SpectralCorrection:
    r"""Restrain in place the change of a weight since ``original``: :math:`W \leftarrow W_0 + U F(\Sigma) V^\top`.

    For any training loop; under Lightning use the ``PRUNE`` callback.

    Args:
        parameter: :math:`W`, two-dimensional; in either orientation.
        original: :math:`W_0`, a copy taken before training.
        law: The law.
        reference: :math:`\sigma_{\max}(W_0)`; computed if not given.

    Returns:
        The correction.

    >>> from prune_lightning.spectral.laws import HardClip
    >>> weight, original = torch.diag(torch.tensor([9.0, 1.0])), torch.zeros(2, 2)
    >>> restrain_(weight, original, HardClip(), reference=4.0).num_above
    1
    >>> weight
    tensor([[4., 0.],
            [0., 1.]])
    """
    if isinstance(parameter.data, DTensor):
        raise UserError("restrain_ needs a whole matrix; for sharded weights, `PRUNE(...).attach(module)` gathers them")
    precise = torch.promote_types(parameter.dtype, torch.float32)
    delta = parameter.detach().to(precise) - original.to(precise)
    found = spectral_correction(delta, law, sigma_max(original) if reference is None else reference)
    if found.correction is not None:
        parameter.copy_((fp64(parameter) - found.correction.dense()).to(parameter))
    return found
