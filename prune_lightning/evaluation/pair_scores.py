"""Scores of pairs of a prompt and a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NOTHING = -1
"""Fills :attr:`PairScores.predicted` after the target's end, and where the likelihood is not finite."""


@dataclass(frozen=True)
class PairScores:
    r"""Scores of ``n`` (prompt, target) pairs, on the model's device.

    Args:
        nll: Mean negative log-likelihood per target token,
            :math:`\ell(y|x) = -\frac1{|y|}\sum_j \log p(y_j \mid x, y_{<j})`, shape ``(n,)``.
        num_hits: Number of target tokens that are the model's first choice given the preceding ones, shape ``(n,)``.
        num_tokens: Length of the target, shape ``(n,)``.
        predicted: The model's first choices at the target's tokens, shape ``(n, longest target)``; ``NOTHING`` fills
            the rest.
        retokenised: Whether the prompt's last tokens change when the target follows, shape ``(n,)``.
    """

    nll: Tensor
    num_hits: Tensor
    num_tokens: Tensor
    predicted: Tensor
    retokenised: Tensor

    def __getitem__(self, index: Any) -> PairScores:
        return PairScores(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def followed_by(self, other: PairScores) -> PairScores:
        """Return these scores and then the other ones."""
        longest = max(self.predicted.shape[1], other.predicted.shape[1])
        level = [
            replace(s, predicted=pad(s.predicted, (0, longest - s.predicted.shape[1]), value=NOTHING))
            for s in (self, other)
        ]
        return PairScores(*(torch.cat([getattr(s, name) for s in level]) for name in self.__dataclass_fields__))

    @property
    def hit(self) -> Tensor:
        """Whether every target token is the model's first choice, as in greedy decoding of its length."""
        return self.num_hits == self.num_tokens

    @property
    def match(self) -> Tensor:
        """The share of the target's tokens that are the model's first choice (token match ratio)."""
        return self.num_hits / self.num_tokens

    @property
    def nonfinite(self) -> Tensor:
        """Whether the likelihood is not finite, which every score counts as a failure."""
        return ~torch.isfinite(self.nll)

    @property
    def num_nonfinite(self) -> int:
        """Number of pairs whose likelihood is not finite."""
        return int(self.nonfinite.sum())

    @property
    def num_retokenised(self) -> int:
        """Number of pairs whose prompt is tokenised differently when the target follows."""
        return int(self.retokenised.sum())

    def num_agreeing(self, other: PairScores) -> Tensor:
        """Return the number of tokens of each target with the same first choice in both models, shape ``(n,)``."""
        width = min(self.predicted.shape[1], other.predicted.shape[1])
        ours, theirs = self.predicted[:, :width], other.predicted[:, :width].to(self.predicted)
        return ((ours == theirs) & (ours != NOTHING)).sum(1)
