"""torchmetrics for editing; they take tensors and know no model, so they work anywhere."""

from prune_lightning.metrics.editing import EditingScore
from prune_lightning.metrics.language import CorpusPerplexity, ExactMatch, MeanRouge, SentencePerplexity

__all__ = ["CorpusPerplexity", "EditingScore", "ExactMatch", "MeanRouge", "SentencePerplexity"]
