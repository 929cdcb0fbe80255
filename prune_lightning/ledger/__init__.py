"""What a run did, kept on disk: a base and every edit on top of it, to resume, to go back, and to take edits out."""

from prune_lightning.ledger.rebuild import Rebuilt, check_base, rebuild
from prune_lightning.ledger.record import FinishRecord, StepRecord
from prune_lightning.ledger.replay import base_model, replay, without
from prune_lightning.ledger.store import Ledger
from prune_lightning.ledger.undo import EditedRun, edited_run

__all__ = [
    "EditedRun",
    "FinishRecord",
    "Ledger",
    "Rebuilt",
    "StepRecord",
    "base_model",
    "check_base",
    "edited_run",
    "rebuild",
    "replay",
    "without",
]
