"""Fluency and consistency of an edited model's generated texts (Meng et al., 2022)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torchmetrics import Metric

from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import TopK, check_room, decode
from prune_lightning.evaluation.measurement import Cases
from prune_lightning.evaluation.prompts import SampledMeasurement
from prune_lightning.metrics import GenerationScore
from prune_lightning.metrics.functional import ngram_entropy, tfidf_vectorizer
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole
from prune_lightning.text.separators import join
from prune_lightning.types import EditRequest


class GenerationQuality(SampledMeasurement):
    """Entropy of sampled texts, and their similarity to reference texts where the data has any.

    Each generation prompt is continued once. The random numbers depend on the seed, the case and the prompt, not on the
    batch, so that two models get the same ones.

    Args:
        max_tokens: Length of a text in tokens, its prompt included.
        top_k: Tokens to draw from.
        seed: Seed of the draws.
        max_cases: See :class:`SampledMeasurement`.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.

    Raises:
        UserError: It is enabled, but ``nltk`` is not installed.
    """

    name = "edit/generation"
    title = "edits, generated texts"
    labels: ClassVar[Mapping[str, str]] = {
        "fluency": "fluency",
        "consistency": "consistency",
    }
    short: ClassVar[Sequence[str]] = ("fluency", "consistency")

    def __init__(
        self,
        max_tokens: Count = 100,
        top_k: Count = 5,
        seed: int = 0,
        max_cases: Count | None = 50,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        super().__init__(max_cases, enabled, counts)
        self.max_tokens, self.top_k, self.seed = max_tokens, top_k, seed
        self._vectorizer: Any = None
        if enabled:
            ngram_entropy("")  # raises now, not after the first edits, if nltk is missing

    def metric(self) -> GenerationScore:
        """Return a fresh metric."""
        return GenerationScore(self._vectorizer)

    def check(self, model: LanguageModel, requests: Sequence[EditRequest]) -> None:
        """Check the requests, what is installed, and the model's context.

        Raises:
            UserError: No request has generation prompts, ``scikit-learn`` is missing where there are references, or
                the texts are longer than the model's context.
        """
        prompts = [text for request in requests for text in request.generation_prompts]
        if not prompts:
            raise UserError("edit/generation: no request has `generation_prompts`; leave it disabled for this data")
        _vectorizer(requests)
        shortest = min(map(len, model.tokens.encode_all([join(text, "").context for text in prompts])))
        check_room("evaluation.generation.max_tokens", model, self.max_tokens - shortest)

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Choose the cases, and fit the vocabulary and weights of the consistency."""
        super().take_reference(model, {place: one for place, one in cases.items() if one.generation_prompts})
        self._vectorizer = _vectorizer(list(cases.values()))

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Generate texts, add them to the metric, and return rows with them."""
        assert isinstance(metric, GenerationScore)
        cases = self.chosen(cases)
        asked = [
            (case, i, join(text, "", request.separator).context)
            for case, request in cases.items()
            for i, text in enumerate(request.generation_prompts)
        ]
        prompts = model.tokens.encode_all([text for _, _, text in asked])
        limits = [max(0, self.max_tokens - len(ids)) for ids in prompts]
        draws = TopK(self.top_k, [random.Random(f"{self.seed}/{c}/{i}").getrandbits(63) for c, i, _ in asked])
        texts: dict[int, list[str]] = {case: [] for case in cases}
        found = decode(model, prompts, limits, sampling=draws)
        for (case, _, _), ids, continuation in zip(asked, prompts, found, strict=True):
            # Together: of a continuation by itself, SentencePiece tokenizers drop the blank at its beginning.
            text = model.tokens.decode([*ids, *continuation.ids])
            texts[case].append(text if continuation.finite else "")
        for case, request in cases.items():
            metric.update(texts[case], case, request.references)
        return [{**row, "texts": texts[int(row["case"])]} for row in metric.rows(cases)]


def _vectorizer(requests: Sequence[EditRequest]) -> Any:
    references = sorted({text for request in requests for text in request.references})
    return tfidf_vectorizer(references) if references else None
