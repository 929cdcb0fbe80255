"""What a run did, kept on disk: a base and every edit on top of it, to go on from, to go back in, to take apart."""

from prune_lightning.ledger.record import StepRecord
from prune_lightning.ledger.replay import base_model, check_base, replay, without
from prune_lightning.ledger.store import Ledger
from prune_lightning.ledger.undo import EditedRun, edited_run

__all__ = ["EditedRun", "Ledger", "StepRecord", "base_model", "check_base", "edited_run", "replay", "without"]
