"""Language metrics that take scores already reduced to one figure per text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ExactMatch(Metric):
    """Share of items whose whole answer is right.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(torch.tensor([True, False]))
        >>> float(metric.compute())
        0.5
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, hit: Tensor) -> None:
        """Add items; ``hit`` has shape ``(n,)``."""
        self.correct += hit.long().sum()
        self.total += len(hit)

    def compute(self) -> Tensor:
        """Return the share."""
        return self.correct / self.total


class CorpusPerplexity(Metric):
    r"""Perplexity of a corpus, :math:`\exp(\sum_i \mathrm{nll}_i / \sum_i n_i)`, every token weighing the same.

    Example:
        >>> metric = CorpusPerplexity()
        >>> metric.update(torch.tensor([2.0]), torch.tensor([2]))
        >>> round(float(metric.compute()), 3)
        2.718
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    nll: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, count: Tensor) -> None:
        """Add texts: summed negative log-likelihood and number of scored tokens of each, shape ``(n,)``."""
        self.nll += nll.double().sum()
        self.count += count.sum()

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return (self.nll / self.count).exp()
