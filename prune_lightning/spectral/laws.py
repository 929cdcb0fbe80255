r"""Restraint laws, functions of the singular values above the reference :math:`\bar s`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from prune_lightning.errors import UserError
from prune_lightning.ranges import AboveOne, Share


class RestraintLaw(Protocol):
    """Maps singular values above a reference; any callable with this signature is a law.

    It is called only with values above ``reference``; smaller ones do not change, bit for bit.
    """

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the restrained values of ``sigma > reference``, same shape, not negative."""
        ...


@dataclass(frozen=True)
class Guarded:
    """A law with a base and the guard.

    Args:
        base: Base of the logarithm, greater than 1; the larger, the stronger the restraint.
        guard: Never let a singular value grow.

    Raises:
        UserError: The base is not a finite number greater than 1.
    """

    base: AboveOne
    guard: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.base, (int, float)) and math.isfinite(self.base) and self.base > 1):
            raise UserError(f"the restraint's `base` is expected to be a number > 1, but got {self.base!r}")

    def unchanged_below(self, reference: float) -> float:
        r"""Return a bound, at least the reference, below which the guarded law changes no singular value.

        Up to where its slope is 1, the law without the guard is above :math:`\sigma`, so the guard takes
        :math:`\sigma`.
        """
        return max(reference, self._unit(reference) / math.log(self.base)) if self.guard else reference

    def _unit(self, reference: float) -> float:
        return 1.0

    def _guarded(self, restrained: Tensor, sigma: Tensor) -> Tensor:
        return torch.minimum(restrained, sigma) if self.guard else restrained


class Logarithm(Guarded):
    r"""PRUNE's law as published (Ma et al., ICLR 2025):

    .. math:: F(\sigma) = \log_a \sigma - \log_a \bar s + \bar s \quad\text{for } \sigma > \bar s .

    Just above :math:`\bar s` its slope is :math:`1/(\bar s \ln a)`: where :math:`\bar s < 1/\ln a` the published law
    *amplifies*. The guard takes :math:`\min(F(\sigma), \sigma)` instead; switch it off to reproduce the published law.

    >>> Logarithm(base=2.0)(torch.tensor([8.0, 16.0]), reference=4.0)
    tensor([5., 6.])
    """

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the restrained singular values, same shape."""
        logarithm = (sigma.log() - math.log(reference)) / math.log(self.base) + reference
        return self._guarded(logarithm, sigma)


class ScaleFreeLogarithm(Guarded):
    r"""The logarithm in units of the reference:

    .. math:: F(\sigma) = \bar s\,(1 + \log_a(\sigma/\bar s)) \quad\text{for } \sigma > \bar s .

    Its slope at :math:`\bar s` is :math:`1/\ln a` for every matrix, so that a base has the same effect on every matrix
    and model; for :math:`a \ge e` it never amplifies. Scaling matrix and reference scales the result.

    >>> ScaleFreeLogarithm(base=4.0)(torch.tensor([8.0, 32.0]), reference=2.0)
    tensor([4., 6.])
    """

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the restrained singular values, same shape."""
        logarithm = reference * (1 + (sigma / reference).log() / math.log(self.base))
        return self._guarded(logarithm, sigma)

    @override
    def _unit(self, reference: float) -> float:
        return reference


@dataclass(frozen=True)
class Linear:
    r"""The linear law of the published code, :math:`F(\sigma) = \bar s + c\,(\sigma - \bar s)`.

    Args:
        slope: :math:`c`, from 0 to 1; 1/2 in the published code. The law cannot amplify, so it needs no guard.

    Raises:
        UserError: A slope outside 0 to 1.

    >>> Linear()(torch.tensor([6.0]), reference=4.0)
    tensor([5.])
    """

    slope: Share = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.slope <= 1:
            raise UserError(f"the restraint's `slope` is expected to be from 0 to 1, but got {self.slope!r}")

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the restrained singular values, same shape."""
        return reference + self.slope * (sigma - reference)


@dataclass(frozen=True)
class HardClip:
    r"""Cut at the reference, :math:`F(\sigma) = \bar s`.

    >>> HardClip()(torch.tensor([6.0]), reference=4.0)
    tensor([4.])
    """

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the reference for every value, same shape."""
        return torch.full_like(sigma, reference)


@dataclass(frozen=True)
class Identity:
    r"""No restraint, :math:`F(\sigma) = \sigma`: the machinery runs, but nothing changes.

    >>> Identity()(torch.tensor([6.0]), reference=4.0)
    tensor([6.])
    """

    def __call__(self, sigma: Tensor, reference: float) -> Tensor:
        """Return the values unchanged."""
        return sigma
