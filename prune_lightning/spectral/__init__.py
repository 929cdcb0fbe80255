"""Singular values: restraint laws, restraining a matrix, and diagnostics, on plain tensors without Lightning."""

from prune_lightning.spectral.accumulated import AccumulatedChange
from prune_lightning.spectral.curvature import LowCurvatureSpace
from prune_lightning.spectral.diagnostics import (
    condition_number,
    effective_rank,
    perturbation_bound,
    sigma_max,
    singular_values,
    stable_rank,
)
from prune_lightning.spectral.factored import FactoredMatrix
from prune_lightning.spectral.laws import (
    Guarded,
    HardClip,
    Identity,
    Linear,
    Logarithm,
    RestraintLaw,
    ScaleFreeLogarithm,
)
from prune_lightning.spectral.matrices import HasEditedMatrices, RestrainedMatrix
from prune_lightning.spectral.restrain import SpectralCorrection, restrain_, restrained, spectral_correction
from prune_lightning.spectral.subspace import Subspace, leading_directions
from prune_lightning.spectral.triplets import NonFiniteChange, Triplets, triplets_above

__all__ = [
    "AccumulatedChange",
    "FactoredMatrix",
    "Guarded",
    "HardClip",
    "HasEditedMatrices",
    "Identity",
    "Linear",
    "Logarithm",
    "LowCurvatureSpace",
    "NonFiniteChange",
    "RestrainedMatrix",
    "RestraintLaw",
    "ScaleFreeLogarithm",
    "SpectralCorrection",
    "Subspace",
    "Triplets",
    "condition_number",
    "effective_rank",
    "leading_directions",
    "perturbation_bound",
    "restrain_",
    "restrained",
    "sigma_max",
    "singular_values",
    "spectral_correction",
    "stable_rank",
    "triplets_above",
]
