"""Singular values: restraint laws, restraining a matrix, and what a spectrum tells. Pure tensors, no Lightning."""

from prune_lightning.spectral.diagnostics import condition_number, sigma_max, singular_values
from prune_lightning.spectral.laws import Logarithm, RestraintLaw
from prune_lightning.spectral.restrain import Restrained, restrain

__all__ = ["Logarithm", "Restrained", "RestraintLaw", "condition_number", "restrain", "sigma_max", "singular_values"]
