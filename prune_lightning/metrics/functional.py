"""The formulas behind the metrics, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def preference(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    r"""Return CounterFact's SCORE per prompt: :math:`1[\ell(\text{wanted}) < \ell(\text{other})]`.

    :math:`\ell` is the mean negative log-likelihood per target token. A tie is a failure, and so is whatever is not
    finite.

    Args:
        nll_wanted: :math:`\ell` of the answer that should be preferred, shape ``(n,)``.
        nll_other: :math:`\ell` of the other one, shape ``(n,)``.

    >>> preference(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([2.0, 2.0, 1.0]))
    tensor([1., 0., 0.])
    """
    better = (nll_wanted < nll_other) & torch.isfinite(nll_wanted) & torch.isfinite(nll_other)
    return better.float()


def mean_by_case(values: Tensor, case: Tensor) -> Tensor:
    """Return the mean of ``values`` within each case, one entry per case.

    Args:
        values: Shape ``(n,)``.
        case: Integer case of each value, shape ``(n,)``.

    >>> mean_by_case(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([7, 7, 9]))
    tensor([0.5000, 1.0000])
    """
    unique, index = case.unique(return_inverse=True)
    zeros = torch.zeros(len(unique), dtype=values.dtype, device=values.device)
    return zeros.index_add(0, index, values) / zeros.index_add(0, index, torch.ones_like(values))


def retention(now: dict[str, float], before: dict[str, float]) -> float:
    """Return the mean over tasks of ``now / before``; a task that scored zero before cannot be retained or lost.

    Args:
        now: Score of each task; NaN counts as zero.
        before: Score of each task on the unedited model.

    >>> retention({"a": 0.5, "b": 0.9}, {"a": 1.0, "b": 0.9})
    0.75
    """
    ratios = [(0.0 if now[task] != now[task] else now[task]) / score for task, score in before.items() if score > 0]
    return sum(ratios) / len(ratios) if ratios else float("nan")


def perplexity(mean_nll: Tensor) -> Tensor:
    r"""Return :math:`\exp(\mathrm{nll})` of mean negative log-likelihoods per token; NaN is infinite, not left out.

    >>> perplexity(torch.tensor([0.0, float("nan")]))
    tensor([1., inf])
    """
    return mean_nll.exp().nan_to_num(nan=float("inf"), posinf=float("inf"))
