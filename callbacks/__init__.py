"""Callbacks for any Lightning Trainer. Import them as ``prune_lightning.callbacks``.

The adapter for the Hugging Face Trainer is in ``prune_lightning.callbacks.hugging_face``.
"""

from .edit_evaluation import EditEvaluation
from .edit_ledger import EditLedger
from .edit_log import EditLog
from .guards import Guards
from .low_curvature import LowCurvature
from .progress import RunProgress
from .prune import PRUNE
from .rect import RECT
from .restraint import Restraint
from .run_log import RunLog
from .spectral_restraint import SpectralRestraint
from .spectrum_monitor import SpectrumMonitor, spectra
from .subspace_filter import SubspaceFilter

__all__ = [
    "PRUNE",
    "RECT",
    "EditEvaluation",
    "EditLedger",
    "EditLog",
    "Guards",
    "LowCurvature",
    "Restraint",
    "RunLog",
    "RunProgress",
    "SpectralRestraint",
    "SpectrumMonitor",
    "SubspaceFilter",
    "spectra",
]
