"""Callbacks for any Lightning Trainer. Import them as ``prune_lightning.callbacks``."""

from .edit_evaluation import EditEvaluation
from .edit_log import EditLog
from .progress import RunProgress
from .prune import PRUNE
from .restraint import SpectralRestraint

__all__ = ["PRUNE", "EditEvaluation", "EditLog", "RunProgress", "SpectralRestraint"]
