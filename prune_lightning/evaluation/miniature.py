"""The bundled abilities in miniature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torchmetrics.functional.text import rouge_score

from prune_lightning.bundled.abilities import AbilityItem, abilities, plain_text
from prune_lightning.bundled.world import load_world
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement
from prune_lightning.evaluation.scoring import greedy_continuations, score_pairs, token_nll
from prune_lightning.metrics import CorpusPerplexity
from prune_lightning.models.language_model import LanguageModel

_ROUGE = ("rouge1", "rouge2", "rougeL")


class MiniatureAbilities(Measurement):
    """The bundled miniature: reasoning, inference, open-domain questions, summarisation, and perplexity.

    Reasoning, inference and questions are exact match of the whole answer, the full stop included: that all of the
    answer's tokens are first choices is what greedy decoding to a natural stop would find. Summarisation decodes
    greedily and takes the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L.

    Args:
        max_items: Use only the first items of each task; ``None`` for all.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "ability/miniature"

    def __init__(self, max_items: int | None = None, enabled: bool = True, counts: Sequence[int] | None = None) -> None:
        super().__init__(enabled, counts)
        self.items = {name: task.test[:max_items] for name, task in abilities(load_world()).items()}
        self.tasks = tuple(self.items)
        self.texts = [item.text() for item in plain_text().test[:max_items]]

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return one job per task, and the perplexity's."""
        return {name: partial(self._measure, model, name) for name in (*self.items, "perplexity")}

    def _measure(self, model: LanguageModel, name: str) -> Measured:
        if name == "perplexity":
            return Measured({name: self._perplexity(model)})
        rows = (self._summaries if name == "summarization" else self._exact_match)(model, self.items[name])
        score = sum(row["score"] for row in rows) / len(rows)
        return Measured(
            {name: score},
            [{"case": i, "task": name, name: row.pop("score"), **row} for i, row in enumerate(rows)],
        )

    def _exact_match(self, model: LanguageModel, items: Sequence[AbilityItem]) -> list[dict[str, Any]]:
        hits = score_pairs(model, [(item.prompt, item.answer) for item in items]).hit
        return [{"score": float(hit)} for hit in hits.tolist()]

    def _summaries(self, model: LanguageModel, items: Sequence[AbilityItem]) -> list[dict[str, Any]]:
        longest = max(len(model.tokens.encode_pair(item.prompt, item.answer).target) for item in items)
        texts = greedy_continuations(model, [item.prompt for item in items], max_new_tokens=longest + 4, stop=".")
        found = [rouge_score(text, item.answer, rouge_keys=_ROUGE) for text, item in zip(texts, items, strict=True)]
        f1 = [sum(float(result[f"{key}_fmeasure"]) for key in _ROUGE) / len(_ROUGE) for result in found]
        return [{"score": score, "generated": text} for score, text in zip(f1, texts, strict=True)]

    def _perplexity(self, model: LanguageModel) -> float:
        metric = CorpusPerplexity().to(model.device)
        metric.update(*token_nll(model, self.texts))
        return float(metric.compute())
