"""Token accuracies of edits under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.metrics.cases import CaseMeans
from prune_lightning.metrics.functional import harmonic_mean


class TokenMatch(CaseMeans):
    """Share of a target's tokens that are right, averaged over the prompts of a case, then over cases.

    Args:
        kinds: Kinds of prompt.
        harmonic: Whether to report the harmonic mean of the kinds' means.
        kwargs: See :class:`torchmetrics.Metric`.

    Examples:
        >>> metric = TokenMatch(["efficacy"])
        >>> metric.update("efficacy", torch.tensor([2, 0]), torch.tensor([4, 1]), torch.tensor([0, 1]))
        >>> metric.compute()["efficacy"], metric.compute()["efficacy_micro"]
        (tensor(0.2500), tensor(0.4000))
    """

    def __init__(self, kinds: Sequence[str], harmonic: bool = False, **kwargs: Any) -> None:
        self.kinds, self.harmonic = tuple(kinds), harmonic
        counts = [f"{kind}_{count}" for kind in kinds for count in ("hits", "tokens", "nonfinite")]
        super().__init__(self.kinds, counts, **kwargs)

    def update(  # type: ignore[override]
        self,
        kind: str,
        hits: Tensor,
        tokens: Tensor,
        case: Tensor,
        prompt: Tensor | None = None,
        nonfinite: Tensor | None = None,
    ) -> None:
        """Add prompts of one kind.

        Args:
            kind: One of ``kinds``.
            hits: Tokens that are right, shape ``(n,)``.
            tokens: Tokens of the target, shape ``(n,)``.
            case: Case of each prompt, shape ``(n,)``.
            prompt: See :meth:`CaseMeans.update`.
            nonfinite: Whether the target's likelihood is not finite, shape ``(n,)``; only counted.
        """
        values = {kind: hits / tokens, f"{kind}_hits": hits, f"{kind}_tokens": tokens}
        if nonfinite is not None:
            values[f"{kind}_nonfinite"] = nonfinite
        for name, value in values.items():
            super().update(name, value, case, prompt)

    def compute(self) -> dict[str, Tensor]:
        """Return each kind's mean over cases and over tokens (``_micro``), ``num_nonfinite``, and ``harmonic``."""
        found = super().compute()
        result = {kind: found[kind] for kind in self.kinds}
        result |= {f"{kind}_micro": found[f"{kind}_hits"] / found[f"{kind}_tokens"] for kind in self.kinds}
        result["num_nonfinite"] = torch.stack([found[f"{kind}_nonfinite"] for kind in self.kinds]).sum()
        if self.harmonic:
            result["harmonic"] = harmonic_mean(torch.stack([found[kind] for kind in self.kinds]))
        return result
