"""Everyday abilities of real language models: multiple choice by likelihood, written for this project."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from prune_lightning.bundled.everyday import ChoiceItem, everyday
from prune_lightning.evaluation.measurement import Cases, Measured, Measurement, Stream
from prune_lightning.evaluation.prompts import spread
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.metrics import ExactMatch
from prune_lightning.models.language_model import LanguageModel

LONGEST_SUBJECT = 12
"""Words of the longest subject that is searched for in an item."""


class EverydayAbilities(Measurement):
    """Everyday knowledge, sums, relations between words, grammar and short reading, as multiple choice.

    A model chooses the continuation with the highest likelihood, the sum of its tokens' log-probabilities. Nothing is
    divided by a length, because every continuation of a table is as often wrong as right. A tie is a failure, and so is
    a likelihood that is not finite. Every process scores all items.

    Items that mention a subject of the run's edits are left out; the summary names them.

    Args:
        max_items: Items of each task, evenly spread over it; ``None`` for all.
        token_budget: Padded tokens per forward pass.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.

    Attributes:
        items: The items of each task.
        left_out: The texts of the items that are left out, by task.
    """

    name = "ability/everyday"
    title = "abilities, everyday"
    labels: ClassVar[Mapping[str, str]] = {
        "knowledge": "everyday knowledge",
        "sums": "sums",
        "relations": "relations between words",
        "grammar": "grammar",
        "reading": "short reading",
        "retention": "retention",
    }
    short: ClassVar[Sequence[str]] = ("knowledge", "reading")

    def __init__(
        self,
        max_items: int | None = None,
        token_budget: int = 1024,
        enabled: bool = True,
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(enabled, counts)
        self.items = {name: spread(items, max_items) for name, items in (everyday() if enabled else {}).items()}
        self.token_budget = token_budget
        self.left_out: dict[str, list[str]] = {}

    @property
    def tasks(self) -> Mapping[str, float]:  # type: ignore[override]
        """The tasks, each with its chance level: the mean over items of one over the number of choices."""
        return {name: sum(1 / len(item.choices) for item in items) / len(items) for name, items in self.items.items()}

    def prepare(self, stream: Stream) -> None:
        """Leave out the items that mention a subject of the stream; a task without items is dropped."""
        subjects = {tuple(_words(request.subject)) for request in stream.requests}
        for name, items in list(self.items.items()):
            mentioning = [item for item in items if not subjects.isdisjoint(_sequences(item))]
            if mentioning:
                self.left_out[name] = [item.text() for item in mentioning]
                self.items[name] = [item for item in items if item not in mentioning]
        self.items = {name: items for name, items in self.items.items() if items}

    def facts(self) -> Mapping[str, Any]:
        """Return the numbers of items, and those that are left out."""
        return {"items": {name: len(items) for name, items in self.items.items()}, "left_out": self.left_out}

    def remarks(self) -> list[str]:
        """Return a sentence that names the items that are left out."""
        texts = [f'"{text}"' for items in self.left_out.values() for text in items]
        return [f"{self.name} leaves out {len(texts)} items about edited subjects: {', '.join(texts)}"] if texts else []

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return one job per task."""
        return {name: partial(self._measure, model, name) for name in self.items}

    def _measure(self, model: LanguageModel, name: str) -> Measured:
        items = self.items[name]
        pairs = [(item.prompt, choice) for item in items for choice in item.choices]
        scores = score_pairs(model, pairs, self.token_budget)
        likelihood = (-scores.nll.double() * scores.num_tokens).cpu().split([len(item.choices) for item in items])
        metric = ExactMatch(sync_on_compute=False)
        hits = []
        for item, found in zip(items, likelihood, strict=True):
            others = found[[k for k in range(len(found)) if k != item.right]]
            hits.append(found.isfinite().all() & (found[item.right] > others.max()))
        metric.update(torch.stack(hits))
        rows = [{"case": i, "task": name, name: float(hit)} for i, hit in enumerate(hits)]
        return Measured({name: float(metric.compute())}, rows)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sequences(item: ChoiceItem) -> Iterator[tuple[str, ...]]:
    """Yield all sequences of words in an item's prompt, and in its choices."""
    for words in map(_words, (item.text(), *item.choices)):
        for start in range(len(words)):
            for end in range(start + 1, min(len(words), start + LONGEST_SUBJECT) + 1):
                yield tuple(words[start:end])
