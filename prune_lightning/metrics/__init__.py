"""torchmetrics for editing. They are independent of any model."""

from prune_lightning.metrics.cases import CaseMeans
from prune_lightning.metrics.counterfact import CounterFactScore
from prune_lightning.metrics.drift import Divergence
from prune_lightning.metrics.generation import GenerationScore
from prune_lightning.metrics.language import CorpusPerplexity, ExactMatch, MeanRouge, SentencePerplexity
from prune_lightning.metrics.stream import AbilityCurve, RetentionMatrix
from prune_lightning.metrics.tokens import TokenMatch

__all__ = [
    "AbilityCurve",
    "CaseMeans",
    "CorpusPerplexity",
    "CounterFactScore",
    "Divergence",
    "ExactMatch",
    "GenerationScore",
    "MeanRouge",
    "RetentionMatrix",
    "SentencePerplexity",
    "TokenMatch",
]
