"""PRUNE: Perturbation Restraint on Upper bouNd for Editing (Ma et al., ICLR 2025, https://arxiv.org/abs/2405.16821)."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import Tensor
from typing_extensions import override

from prune_lightning.spectral import Logarithm, restrain, sigma_max
from prune_lightning.types import RestrainedMatrix

from .restraint import SpectralRestraint


class PRUNE(SpectralRestraint):
    r"""Restrain the singular values of the accumulated change above the largest one of the original matrix.

    .. math:: W = W_0 + U F(\Sigma) V^\top, \qquad
              F(\sigma) = \log_a \sigma - \log_a \bar s + \bar s \text{ for } \sigma > \bar s = \sigma_{\max}(W_0)

    and the identity below.

    Args:
        base: :math:`a > 1`; the larger, the stronger the restraint.
        guard: Never let a singular value grow. The published law does so where :math:`\bar s < 1/\ln a`; switch the
            guard off to reproduce it.
        parameters: See :class:`SpectralRestraint`.
        schedule: See :class:`SpectralRestraint`.
        every_n: See :class:`SpectralRestraint`.
        accumulate: See :class:`SpectralRestraint`.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[PRUNE(base=1.2)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        base: float = 1.2,
        guard: bool = True,
        parameters: Sequence[str] | None = None,
        schedule: str = "each",
        every_n: int = 1,
        accumulate: str = "raw",
    ) -> None:
        super().__init__(parameters, schedule, every_n, accumulate)
        self.law = Logarithm(base, guard)
        self._references: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take hold of the matrices; what was known of another module's originals does not apply."""
        super().on_train_start(trainer, pl_module)
        self._references = {}

    @override
    def restrain(self, matrix: RestrainedMatrix, change: Tensor) -> Tensor:
        """Apply the law to the change's singular values."""
        if matrix.name not in self._references:
            self._references[matrix.name] = sigma_max(matrix.reference())
        return restrain(change, self.law, self._references[matrix.name]).delta
