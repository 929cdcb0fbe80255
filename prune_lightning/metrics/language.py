"""Language metrics of scores that are already reduced to one figure per text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import ROUGEScore
from torchmetrics.utilities import dim_zero_cat

from prune_lightning.metrics.functional import perplexity


class ExactMatch(Metric):
    """Share of items whose whole answer is right.

    Examples:
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
    r"""Perplexity of a corpus, :math:`\exp(\sum_i \mathrm{nll}_i / \sum_i n_i)`, with equal weight for every token.

    Examples:
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


class SentencePerplexity(Metric):
    r"""ME-PPL: perplexities of single sentences, :math:`\mathrm{ppl}_i = \exp(\mathrm{nll}_i / n_i)`, and collapse.

    ``mean`` is their arithmetic mean (ME-PPL's own figure, which one bad sentence can dominate); ``median`` and ``max``
    are over sentences, too; ``corpus`` weights all tokens equally. A sentence with a non-finite likelihood has an
    infinite perplexity and is counted in ``num_nonfinite``. Texts without a scored token are left out.

    ``collapse_absolute`` is 1 if ``mean`` exceeds a threshold, ``collapse_relative`` if ``corpus`` exceeds a multiple
    of the unedited model's; both are 1 if a sentence is not finite. There is no published threshold.

    Args:
        absolute: Threshold of ``mean``.
        relative: Multiple of ``reference`` above which ``corpus`` counts as collapse.
        reference: ``corpus`` of the unedited model; without it ``collapse_relative`` is not computed.
        kwargs: For :class:`torchmetrics.Metric`.

    Examples:
        >>> metric = SentencePerplexity()
        >>> metric.update(torch.tensor([2.0, 0.0]), torch.tensor([2, 2]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items() if name in ("mean", "corpus")}
        {'mean': 1.859, 'corpus': 1.649}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    token_nll: list[Tensor]
    nll: Tensor
    count: Tensor
    num_nonfinite: Tensor

    def __init__(
        self, absolute: float = 1000.0, relative: float = 10.0, reference: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.absolute, self.relative, self.reference = absolute, relative, reference
        # torchmetrics pads an empty rank with single precision, which perplexities would overflow, so logarithms are
        # stored.
        self.add_state("token_nll", [], dist_reduce_fx="cat")
        self.add_state("nll", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, count: Tensor) -> None:
        """Add sentences: summed negative log-likelihood and number of scored tokens of each, shape ``(n,)``."""
        nll, count = nll[count > 0], count[count > 0]
        self.token_nll.append((nll / count).float())
        self.nll += nll.double().sum()
        self.count += count.sum()
        self.num_nonfinite += (~torch.isfinite(nll)).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the figures and the flags, one scalar each."""
        perplexities = perplexity(dim_zero_cat(self.token_nll).double()).sort().values
        middle = len(perplexities) // 2
        corpus = perplexity(self.nll / self.count)
        broken = self.num_nonfinite > 0
        result = {
            "mean": perplexities.mean(),
            "median": (perplexities[~middle] + perplexities[middle]) / 2,
            "max": perplexities[-1],
            "corpus": corpus,
            "num_nonfinite": self.num_nonfinite,
            "collapse_absolute": (broken | (perplexities.mean() > self.absolute)).double(),
        }
        if self.reference is not None:
            result["collapse_relative"] = (broken | (corpus > self.relative * self.reference)).double()
        return result


class MeanRouge(ROUGEScore):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, averaged over texts.

    Args:
        kwargs: For :class:`torchmetrics.text.ROUGEScore`: ``normalizer``, ``tokenizer``, ...

    Examples:
        >>> metric = MeanRouge()
        >>> metric.update(["the cat sat", "no"], ["the cat sat", "yes"])
        >>> float(metric.compute()), metric.by_text()
        (0.5, [1.0, 0.0])
    """

    full_state_update = False
    _KEYS = ("rouge1", "rouge2", "rougeL")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(rouge_keys=self._KEYS, **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean over texts."""
        result = super().compute()
        return torch.stack([result[f"{key}_fmeasure"] for key in self._KEYS]).double().mean()

    def by_text(self) -> list[float]:
        """Return the figure of each text added in this process, in order."""
        scores = torch.stack([torch.stack(getattr(self, f"{key}_fmeasure")) for key in self._KEYS])
        return [float(score) for score in scores.double().mean(0)]
