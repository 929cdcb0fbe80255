"""torchmetrics for editing; they know no model, so they work anywhere."""

from prune_lightning.metrics.cases import CaseMeans
from prune_lightning.metrics.counterfact import CounterFactScore
from prune_lightning.metrics.generation import GenerationScore
from prune_lightning.metrics.language import CorpusPerplexity, ExactMatch
from prune_lightning.metrics.tokens import TokenMatch

__all__ = ["CaseMeans", "CorpusPerplexity", "CounterFactScore", "ExactMatch", "GenerationScore", "TokenMatch"]
