"""The bundled miniature benchmark of general abilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from prune_lightning.bundled.abilities import abilities, plain_text
from prune_lightning.bundled.world import load_world
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement
from prune_lightning.evaluation.scoring import greedy_continuations, score_pairs, token_nll
from prune_lightning.metrics import CorpusPerplexity, ExactMatch, MeanRouge
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole


class MiniatureAbilities(Measurement):
    """The bundled miniature benchmark: reasoning, inference, open-domain questions, summarisation, and perplexity.

    Reasoning, inference and questions are scored by exact match of the whole answer, including the full stop: all of
    the answer's tokens must be first choices, as in greedy decoding. Summarisation decodes greedily and reports the
    mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L. Every process scores all items.

    Args:
        max_items: Use only the first items of each task; ``None`` for all.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "ability/miniature"
    title = "abilities, bundled tasks"
    labels: ClassVar[Mapping[str, str]] = {
        "reasoning": "reasoning",
        "nli": "natural-language inference",
        "qa": "open-domain question answering",
        "summarization": "summarisation",
        "retention": "retention",
        "perplexity": "perplexity",
    }
    short: ClassVar[Sequence[str]] = ("perplexity", "reasoning", "qa")
    lower: ClassVar[frozenset[str]] = frozenset({"perplexity"})

    def __init__(
        self, max_items: Count | None = None, enabled: bool = True, counts: Sequence[Whole] | None = None
    ) -> None:
        super().__init__(enabled, counts)
        suite = abilities(load_world()) if enabled else {}
        self.items = {name: task.test[:max_items] for name, task in suite.items()}
        self.tasks = {name: task.chance for name, task in suite.items()}
        self.texts = [item.text() for item in plain_text().test[:max_items]] if enabled else []

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return one job per task, and the perplexity's."""
        return {name: partial(self._measure, model, name) for name in (*self.items, "perplexity")}

    def _measure(self, model: LanguageModel, name: str) -> Measured:
        if name == "perplexity":
            return Measured({name: self._perplexity(model)})
        judge = self._rouge if name == "summarization" else self._exact_match
        score, rows = judge(model, name)
        return Measured({name: score}, [{"case": i, "task": name, **row} for i, row in enumerate(rows)])

    def _exact_match(self, model: LanguageModel, name: str) -> tuple[float, list[dict[str, Any]]]:
        metric = ExactMatch(sync_on_compute=False).to(model.device)
        hit = score_pairs(model, [(item.prompt, item.answer) for item in self.items[name]]).hit
        metric.update(hit)
        return float(metric.compute()), [{name: value} for value in hit.double().tolist()]

    def _rouge(self, model: LanguageModel, name: str) -> tuple[float, list[dict[str, Any]]]:
        metric, items = MeanRouge(sync_on_compute=False).to(model.device), self.items[name]
        longest = max(len(model.tokens.encode_pair(item.prompt, item.answer).target) for item in items)
        texts = greedy_continuations(model, [item.prompt for item in items], max_new_tokens=longest + 4, stop=".")
        metric.update(texts, [item.answer for item in items])
        rows = zip(metric.by_text(), texts, strict=True)
        return float(metric.compute()), [{name: value, "generated": text} for value, text in rows]

    def _perplexity(self, model: LanguageModel) -> float:
        metric = CorpusPerplexity(sync_on_compute=False).to(model.device)
        metric.update(*token_nll(model, self.texts))
        return float(metric.compute())
