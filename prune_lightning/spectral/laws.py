"""Restraint laws: what becomes of the singular values above the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prune_lightning.errors import UserError


class RestraintLaw(Protocol):
    """Maps the singular values of an accumulated update; values up to ``reference`` are left as they are."""

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the restrained values."""
        ...


@dataclass(frozen=True)
class Logarithm:
    r"""PRUNE's law (Ma et al., ICLR 2025):

    .. math:: F(\sigma) = \sigma \text{ if } \sigma \le \bar s, \quad
              \log_a \sigma - \log_a \bar s + \bar s \text{ otherwise,}

    with :math:`\bar s` the largest singular value of the original matrix. Just above :math:`\bar s` its slope is
    :math:`1/(\bar s \ln a)`: where :math:`\bar s < 1/\ln a` the published law *amplifies*. The guard takes
    :math:`\min(F(\sigma), \sigma)` instead; switch it off to reproduce.

    Args:
        base: :math:`a`, greater than 1.
        guard: Never let a singular value grow.

    Raises:
        UserError: The base is not a finite number greater than 1.

    >>> Logarithm(base=2.0)(torch.tensor([1.0, 4.0, 8.0]), reference=4.0)
    tensor([1., 4., 5.])
    """

    base: float
    guard: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.base, (int, float)) and math.isfinite(self.base) and self.base > 1):
            raise UserError(f"the restraint's `base` is expected to be a number > 1, but got {self.base!r}")

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the restrained singular values, same shape."""
        above = sigma.clamp_min(reference)
        logarithm = (above.log() - math.log(reference)) / math.log(self.base) + reference
        restrained = torch.where(sigma > reference, logarithm, sigma)
        return torch.minimum(restrained, sigma) if self.guard else restrained
