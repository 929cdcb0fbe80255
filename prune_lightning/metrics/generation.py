"""Fluency and consistency of generated texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prune_lightning.metrics.cases import CaseMeans
from prune_lightning.metrics.functional import ngram_entropy, tfidf_similarity


class GenerationScore(CaseMeans):
    """Fluency and consistency of generated texts, times 100 as published.

    Fluency is the weighted entropy of bigrams and trigrams (:func:`ngram_entropy`), consistency the TF-IDF cosine with
    reference texts (:func:`tfidf_similarity`).

    Args:
        vectorizer: A fitted TF-IDF vectoriser; without one consistency is not computed.
        kwargs: See :class:`torchmetrics.Metric`.

    Examples:
        >>> metric = GenerationScore()
        >>> metric.update(["one two three four five"], case=0)
        >>> {name: round(float(value)) for name, value in metric.compute().items()}
        {'fluency': 172}
    """

    def __init__(self, vectorizer: Any = None, **kwargs: Any) -> None:
        super().__init__(["fluency", *(["consistency"] if vectorizer is not None else [])], **kwargs)
        self.vectorizer = vectorizer

    def update(  # type: ignore[override]
        self, texts: Sequence[str], case: int, references: Sequence[str] = ()
    ) -> None:
        """Add the generated texts of one case.

        Args:
            texts: Generated texts including their prompts; empty if generation failed.
            case: Number of the case.
            references: Reference texts; without any the case has no consistency score.
        """
        entropies = [100 * ngram_entropy(text) for text in texts]
        super().update("fluency", torch.tensor(entropies), torch.full((len(texts),), case))
        if references and self.vectorizer is not None:
            similarity = 100 * tfidf_similarity(self.vectorizer, texts, references)
            super().update("consistency", torch.tensor([similarity]), torch.tensor([case]))
