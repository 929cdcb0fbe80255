"""Editing scores as a torchmetric: efficacy, generalization, locality, as SCORE and as ACCURACY."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from prune_lightning.errors import UserError, near
from prune_lightning.metrics.functional import mean_by_case, preference


class EditingScore(Metric):
    """CounterFact's SCORE and ACCURACY for the three kinds of prompt, prompts averaged in their case, then cases.

    SCORE: the wanted answer is likelier per token than the other one. ACCURACY: every token of the wanted answer is
    the model's first choice. For efficacy and generalization the wanted answer is the new target, for locality the
    probe's own answer. A kind without any case gives NaN.

    Example:
        >>> metric = EditingScore()
        >>> metric.update("efficacy", torch.tensor([0.1]), torch.tensor([0.7]), torch.tensor([True]), torch.tensor([0]))
        >>> float(metric.compute()["efficacy_score"])
        1.0
    """

    KINDS = ("efficacy", "generalization", "locality")
    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    score_sum: Tensor
    score_count: Tensor
    accuracy_sum: Tensor
    accuracy_count: Tensor
    num_nonfinite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("score_sum", "score_count", "accuracy_sum", "accuracy_count"):
            self.add_state(name, torch.zeros(len(self.KINDS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, kind: str, nll_wanted: Tensor, nll_other: Tensor | None, hit: Tensor, case: Tensor) -> None:
        """Add prompts of one kind; all prompts of a case must come in the same call.

        Args:
            kind: ``efficacy``, ``generalization`` or ``locality``.
            nll_wanted: Mean NLL per token of the wanted answer, shape ``(n,)``.
            nll_other: The same of the other answer; ``None`` where there is none to compare with.
            hit: Every token of the wanted answer is the first choice, shape ``(n,)``.
            case: Case of each prompt, shape ``(n,)``.

        Raises:
            UserError: Unknown kind.
        """
        if kind not in self.KINDS:
            raise UserError(f"unknown kind {kind!r}: {near(kind, self.KINDS)}")
        index = self.KINDS.index(kind)
        accuracy = mean_by_case(hit.double(), case)
        self.accuracy_sum[index] += accuracy.sum()
        self.accuracy_count[index] += len(accuracy)
        self.num_nonfinite += (~torch.isfinite(nll_wanted)).sum()
        if nll_other is not None:
            score = mean_by_case(preference(nll_wanted, nll_other).double(), case)
            self.score_sum[index] += score.sum()
            self.score_count[index] += len(score)

    def compute(self) -> dict[str, Tensor]:
        """Return ``{kind}_score`` and ``{kind}_accuracy`` for each kind."""
        score, accuracy = self.score_sum / self.score_count, self.accuracy_sum / self.accuracy_count
        result = {}
        for index, kind in enumerate(self.KINDS):
            result[f"{kind}_score"], result[f"{kind}_accuracy"] = score[index], accuracy[index]
        return result
