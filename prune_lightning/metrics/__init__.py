"""torchmetrics for editing; they take tensors and know no model, so they work anywhere."""

from prune_lightning.metrics.editing import EditingScore
from prune_lightning.metrics.language import CorpusPerplexity, ExactMatch, MeanRouge, SentencePerplexity
from prune_lightning.metrics.stream import AbilityCurve, RetentionMatrix

__all__ = [
    "AbilityCurve",
    "CorpusPerplexity",
    "EditingScore",
    "ExactMatch",
    "MeanRouge",
    "RetentionMatrix",
    "SentencePerplexity",
]
