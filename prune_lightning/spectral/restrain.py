r"""Apply a restraint law to the singular values of a matrix: :math:`U F(\Sigma) V^\top`, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.spectral.laws import RestraintLaw

_SAFE_RATIO = 1e-6


@dataclass(frozen=True)
class Restrained:
    """The outcome of one restraint.

    Args:
        delta: The restrained matrix; the same object as the input if nothing exceeded the reference.
        num_restrained: Number of singular values that were changed.
        sigma_before: Largest singular value before; where no factorisation was needed, its upper bound, the
            Frobenius norm.
    """

    delta: Tensor
    num_restrained: int
    sigma_before: float


def restrain(delta: Tensor, law: RestraintLaw, reference: float) -> Restrained:
    r"""Restrain the singular values of ``delta`` above ``reference``.

    Only the triplets :math:`J` above the reference change, so with :math:`U_J` from the eigenvectors of
    :math:`\Delta\Delta^\top` (fp64, the smaller side)

    .. math:: \Delta_r = \Delta - U_J \operatorname{diag}(1 - F(\sigma_J)/\sigma_J)\, U_J^\top \Delta ,

    which equals :math:`U F(\Sigma) V^\top`. A Frobenius norm up to the reference certifies that nothing can change.
    Where the largest singular value dwarfs the reference, squaring would cost digits and a full SVD runs instead.

    Args:
        delta: Matrix, any shape and floating dtype.
        law: The law :math:`F`.
        reference: :math:`\bar s > 0`.

    Raises:
        UserError: ``delta`` holds NaN or infinity, or the reference is not positive.
    """
    if not reference > 0:
        raise UserError(f"the reference singular value is expected to be positive, but got {reference}")
    norm = float(torch.linalg.matrix_norm(delta.double()))
    if not norm < float("inf"):
        raise UserError("the accumulated update holds NaN or infinity; it cannot be restrained")
    if norm <= reference:
        return Restrained(delta, 0, norm)
    wide = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    if reference < _SAFE_RATIO * norm:
        left, sigma, _ = torch.linalg.svd(wide, full_matrices=False)
    else:
        eigenvalues, left = torch.linalg.eigh(wide @ wide.T)
        sigma = eigenvalues.clamp_min(0).sqrt()
    top = float(sigma.max())
    chosen = sigma > reference
    if not chosen.any():
        return Restrained(delta, 0, top)
    left, sigma = left[:, chosen], sigma[chosen]
    shrink = 1 - law(sigma, reference) / sigma
    restrained = wide - (left * shrink) @ (left.T @ wide)
    restrained = restrained if delta.shape[0] <= delta.shape[1] else restrained.T
    return Restrained(restrained.to(delta.dtype).contiguous(), int(chosen.sum()), top)
