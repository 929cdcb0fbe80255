"""Edit a model from Python: :class:`Editor`, on the same engine as `train.py`."""

from prune_lightning.editor.editor import Editor
from prune_lightning.editor.facts import Facts
from prune_lightning.editor.results import Answers, Edited, Scores

__all__ = ["Answers", "Edited", "Editor", "Facts", "Scores"]
