"""General abilities that an edited model should keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torchmetrics.text import ROUGEScore

from prune_lightning.bundled.abilities import AbilityItem, abilities, plain_text
from prune_lightning.bundled.world import load_world
from prune_lightning.evaluation.scoring import greedy_continuations, score_pairs, token_nll
from prune_lightning.metrics import CorpusPerplexity, ExactMatch
from prune_lightning.models.language_model import LanguageModel

_ROUGE = ("rouge1", "rouge2", "rougeL")


class AbilitySuite(Protocol):
    """Named measurements of a model; those named in ``tasks`` enter the retention, higher being better."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the scored tasks."""
        ...

    def jobs(self, model: LanguageModel) -> Mapping[str, Callable[[], float]]:
        """Return what to run, by the name of the result."""
        ...


class MiniatureAbilities:
    """The bundled miniature: reasoning, inference, open-domain questions, summarisation, and perplexity.

    Reasoning, inference and questions are exact match of the whole answer, the full stop included: that all of the
    answer's tokens are first choices is what greedy decoding to a natural stop would find. Summarisation decodes
    greedily and takes the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L.

    Args:
        max_items: Use only the first items of each task; ``None`` for all.
    """

    def __init__(self, max_items: int | None = None) -> None:
        self.items = {name: task.test[:max_items] for name, task in abilities(load_world()).items()}
        self.texts = [item.text() for item in plain_text().test[:max_items]]

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the four scored tasks."""
        return tuple(self.items)

    def jobs(self, model: LanguageModel) -> Mapping[str, Callable[[], float]]:
        """Return what to run, by the name of the result."""
        jobs: dict[str, Callable[[], float]] = {}
        for name, items in self.items.items():
            score = self._rouge if name == "summarization" else self._exact_match
            jobs[name] = partial(score, model, items)
        jobs["perplexity"] = partial(self._perplexity, model)
        return jobs

    def _exact_match(self, model: LanguageModel, items: Sequence[AbilityItem]) -> float:
        metric = ExactMatch().to(model.device)
        metric.update(score_pairs(model, [(item.prompt, item.answer) for item in items]).hit)
        return float(metric.compute())

    def _rouge(self, model: LanguageModel, items: Sequence[AbilityItem]) -> float:
        metric = ROUGEScore(rouge_keys=_ROUGE).to(model.device)
        longest = max(len(model.tokens.encode_pair(item.prompt, item.answer).target) for item in items)
        texts = greedy_continuations(model, [item.prompt for item in items], max_new_tokens=longest + 4, stop=".")
        metric.update(texts, [item.answer for item in items])
        result = metric.compute()
        return sum(float(result[f"{key}_fmeasure"]) for key in _ROUGE) / len(_ROUGE)

    def _perplexity(self, model: LanguageModel) -> float:
        metric = CorpusPerplexity().to(model.device)
        metric.update(*token_nll(model, self.texts))
        return float(metric.compute())
