"""Perplexity of sentences after each edit, which finds single edits that collapse a model (Yang et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torchmetrics import Metric

from prune_lightning.bundled.abilities import plain_text
from prune_lightning.evaluation.me_ppl import read_sentences
from prune_lightning.evaluation.measurement import Cases, EditingMeasurement
from prune_lightning.evaluation.scoring import token_nll
from prune_lightning.metrics import CaseMeans
from prune_lightning.metrics.functional import perplexity
from prune_lightning.models.batching import TOKEN_BUDGET
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Positive, Whole


class EditPerplexity(EditingMeasurement):
    """ME-PPL, the mean of the sentences' perplexities, as a score of each edit.

    Under the protocol ``single`` it is measured after every edit alone, and each edit has its own row. Otherwise all
    edits at a count have the same.

    Scores: ``me_ppl``, the mean over edits; ``relative``, the same divided by the unedited model's; ``collapsed``, the
    share of edits whose ME-PPL is not finite or above ``factor`` times the unedited model's.

    Args:
        path: JSON array or JSONL of sentences; ``None`` for the bundled text.
        key: Key of the sentence in an object.
        max_items: Use only the first sentences; the papers' code has 50.
        factor: Multiple of the unedited model's ME-PPL above which a model counts as collapsed. The paper has none.
        token_budget: Padded tokens per forward pass.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    name = "edit/perplexity"
    title = "perplexity after each edit (ME-PPL)"
    labels: ClassVar[Mapping[str, str]] = {
        "me_ppl": "ME-PPL",
        "relative": "ME-PPL, relative to the unedited model",
        "collapsed": "edits that collapse the model",
    }

    def __init__(
        self,
        path: str | None = None,
        key: str = "Text",
        max_items: Count | None = 50,
        factor: Positive = 10.0,
        token_budget: Count = TOKEN_BUDGET,
        enabled: bool = True,
        counts: Sequence[Whole] | None = None,
    ) -> None:
        super().__init__(enabled, counts)
        found = read_sentences(path, key) if path and enabled else [item.text() for item in plain_text().test]
        self.sentences = found[:max_items]
        self.factor, self.token_budget = factor, token_budget
        self.reference: float | None = None

    def metric(self) -> CaseMeans:
        """Return a fresh metric."""
        return CaseMeans(list(self.labels))

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Keep the unedited model's ME-PPL."""
        self.reference = self._me_ppl(model)

    def facts(self) -> Mapping[str, Any]:
        """Return the unedited model's ME-PPL, the number of sentences and the factor."""
        return {"reference": self.reference, "sentences": len(self.sentences), "factor": self.factor}

    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Measure the model and add the result for each case."""
        assert isinstance(metric, CaseMeans)
        value = self._me_ppl(model)
        relative = value / (self.reference or value)
        figures = {"me_ppl": value, "relative": relative, "collapsed": float(not relative <= self.factor)}
        places = torch.tensor(sorted(cases), dtype=torch.long)
        for name, figure in figures.items():
            metric.update(name, torch.full((len(places),), figure), places)
        return metric.rows(cases)

    def _me_ppl(self, model: LanguageModel) -> float:
        nll, count = token_nll(model, self.sentences, self.token_budget, special_tokens=False)
        scored = count > 0
        return float(perplexity(nll[scored].double() / count[scored]).mean())
