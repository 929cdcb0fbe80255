"""Running moments of rows of features: to standardise them, or to whiten them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-7
_LEAST_VARIANCE = 1e-6


class RunningMoments(nn.Module):
    r"""Mean and standard deviation of every feature over all rows so far, kept in buffers.

    A block of :math:`m` rows is merged with the :math:`k` earlier ones by Chan's formula, equivalent to Welford's row
    by row:

    .. math:: \mu \leftarrow \mu + \tfrac{m}{k+m} d, \qquad S \leftarrow S + S_m + \tfrac{km}{k+m} d^2, \qquad
              d = \mu_m - \mu

    Args:
        features: Width of a row.
        epsilon: Added to the standard deviations.
        inflated: Multiply :math:`S_m` by :math:`m/(m-1)`, as UltraEdit's public code does.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, features: int, epsilon: float = EPSILON, inflated: bool = False) -> None:
        super().__init__()
        self.epsilon, self.inflated = epsilon, inflated
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(features, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows of shape ``(m, features)``."""
        if not len(rows):
            return
        rows = rows.double()
        mean = rows.mean(0)
        total, difference = self.count + len(rows), mean - self.mean
        self._spread(rows - mean, difference, self.count * len(rows) / total)
        self.mean += difference * (len(rows) / total)
        self.count.copy_(total)

    def _spread(self, centred: Tensor, difference: Tensor, weight: Tensor) -> None:
        """Add the spread of a block, whose mean differs from the earlier one."""
        inflation = len(centred) / max(len(centred) - 1, 1) if self.inflated else 1.0
        self.squares += inflation * centred.square().sum(0) + difference.square() * weight

    def reset(self) -> None:
        """Reset to no rows."""
        for buffer in self.buffers():
            buffer.zero_()

    def deviation(self) -> Tensor:
        """Return the standard deviation of each feature, shape ``(features,)``; one with fewer than two rows."""
        if self.count < 2:
            return torch.ones_like(self.squares)
        return (self.squares / (self.count - 1)).sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        r"""Return :math:`(x - \mu) / (\sigma + \epsilon)`."""
        return (rows - self.mean.to(rows)) / (self.deviation().to(rows) + self.epsilon)


class RunningCovariance(RunningMoments):
    r"""Running moments that also keep the covariance, and whiten rows once it has full rank.

    Args:
        features: Width of a row.
        epsilon: See :class:`RunningMoments`.
    """

    products: Tensor

    def __init__(self, features: int, epsilon: float = EPSILON) -> None:
        super().__init__(features, epsilon)
        self.register_buffer("products", torch.zeros(features, features, dtype=torch.float64))

    def _spread(self, centred: Tensor, difference: Tensor, weight: Tensor) -> None:
        super()._spread(centred, difference, weight)
        self.products += centred.T @ centred + weight * torch.outer(difference, difference)

    def forward(self, rows: Tensor) -> Tensor:
        r"""Return :math:`\operatorname{cov}^{-1/2} (x - \mu)`; standardised rows while there are too few.

        Eigenvalues of the covariance below :math:`10^{-6}` count as that.
        """
        if self.count <= len(self.mean) + 1:
            return super().forward(rows)
        values, vectors = torch.linalg.eigh(self.products / (self.count - 1))
        root = (vectors * values.clamp_min(_LEAST_VARIANCE).rsqrt()) @ vectors.T
        return (rows - self.mean.to(rows)) @ root.to(rows)
