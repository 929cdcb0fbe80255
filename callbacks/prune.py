"""PRUNE: Perturbation Restraint on Upper bouNd for Editing (Ma et al., ICLR 2025, https://arxiv.org/abs/2405.16821)."""

from __future__ import annotations

from collections.abc import Sequence

from prune_lightning.ranges import AboveOne, Count
from prune_lightning.spectral import Logarithm

from .spectral_restraint import SpectralRestraint


class PRUNE(SpectralRestraint):
    r"""Restrain the singular values of the accumulated change above the largest one of the original matrix.

    .. math:: F(\sigma) = \log_a \sigma - \log_a \bar s + \bar s \quad\text{for } \sigma > \bar s = \sigma_{\max}(W_0)

    Args:
        base: :math:`a > 1`; the larger, the stronger the restraint.
        guard: Never let a singular value grow. The published law does so where :math:`\bar s < 1/\ln a`; switch the
            guard off to reproduce it.
        parameters: See :class:`Restraint`.
        schedule: See :class:`SpectralRestraint`.
        every_n: See :class:`Restraint`.
        accumulate: See :class:`SpectralRestraint`.
        non_finite: See :class:`SpectralRestraint`.
        feedback: See :class:`SpectralRestraint`.

    Examples:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[PRUNE(base=1.2)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        base: AboveOne = 1.2,
        guard: bool = True,
        parameters: str | Sequence[str] | None = None,
        schedule: str = "each",
        every_n: Count = 1,
        accumulate: str | None = None,
        non_finite: str = "raise",
        feedback: bool = False,
    ) -> None:
        super().__init__(Logarithm(base, guard), parameters, schedule, every_n, accumulate, non_finite, feedback)
