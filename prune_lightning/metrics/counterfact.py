"""CounterFact's scores as a torchmetric: SCORE, MAGNITUDE and ACCURACY of efficacy, generalization, locality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prune_lightning.errors import one_of
from prune_lightning.metrics.cases import CaseMeans
from prune_lightning.metrics.functional import harmonic_mean, magnitude, preference


class CounterFactScore(CaseMeans):
    """CounterFact's scores for the three kinds of prompt, averaged over the prompts of a case, then over cases.

    SCORE: the wanted answer is likelier per token than the other one. MAGNITUDE: by how much. ACCURACY: every token of
    the wanted answer is the model's first choice. For efficacy and generalization the wanted answer is the new target,
    for locality the probe's own answer. A kind without cases gives NaN.

    The harmonic mean S is that of the three means over the data set, not a mean over cases, and is 0 if one of them is.

    Examples:
        >>> metric = CounterFactScore()
        >>> metric.update("efficacy", torch.tensor([0.1]), torch.tensor([0.7]), torch.tensor([True]), torch.tensor([0]))
        >>> float(metric.compute()["efficacy_score"])
        1.0
    """

    KINDS = ("efficacy", "generalization", "locality")
    SCORES = ("score", "magnitude", "accuracy")
    COUNTS = ("nonfinite", "retokenised")

    def __init__(self, **kwargs: Any) -> None:
        names = [f"{kind}_{score}" for kind in self.KINDS for score in self.SCORES]
        counts = [f"{kind}_{count}" for count in self.COUNTS for kind in self.KINDS]
        super().__init__(names, counts, **kwargs)

    def update(  # type: ignore[override]
        self,
        kind: str,
        nll_wanted: Tensor,
        nll_other: Tensor | None,
        hit: Tensor,
        case: Tensor,
        prompt: Tensor | None = None,
        retokenised: Tensor | None = None,
    ) -> None:
        """Add prompts of one kind.

        Args:
            kind: ``efficacy``, ``generalization`` or ``locality``.
            nll_wanted: Mean NLL per token of the wanted answer, shape ``(n,)``.
            nll_other: The same of the other answer; ``None`` if there is none.
            hit: Whether every token of the wanted answer is the first choice, shape ``(n,)``.
            case: Case of each prompt, shape ``(n,)``.
            prompt: Number of each prompt within its case and kind, shape ``(n,)``; if not given they are counted, and
                all prompts of a case have to come in the same call.
            retokenised: Whether the prompt is tokenised differently with the answer, shape ``(n,)``; only counted.

        Raises:
            UserError: Unknown kind.
        """
        one_of("kind", kind, self.KINDS)
        nonfinite = ~torch.isfinite(nll_wanted)
        values = {"accuracy": hit & ~nonfinite}
        if nll_other is not None:
            values["score"] = preference(nll_wanted, nll_other)
            values["magnitude"] = magnitude(nll_wanted, nll_other)
            nonfinite = nonfinite | ~torch.isfinite(nll_other)
        values["nonfinite"] = nonfinite
        if retokenised is not None:
            values["retokenised"] = retokenised
        for name, value in values.items():
            super().update(f"{kind}_{name}", value, case, prompt)

    def compute(self) -> dict[str, Tensor]:
        """Return ``{kind}_{score}`` of each kind, the harmonic means, ``num_nonfinite`` and ``num_retokenised``."""
        means = super().compute()
        result = {name: means[name] for name in self.means}
        for score in ("score", "accuracy"):
            result[f"harmonic_{score}"] = harmonic_mean(torch.stack([means[f"{kind}_{score}"] for kind in self.KINDS]))
        for count in self.COUNTS:
            result[f"num_{count}"] = torch.stack([means[f"{kind}_{count}"] for kind in self.KINDS]).sum()
        return result
