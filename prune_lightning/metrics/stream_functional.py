r"""The formulas of metrics over a stream of edits, on plain tensors.

:math:`A[t,i] \in [0,1]` is the score of edit ``i`` after ``t`` edits; it was written at ``c(i)`` edits, its age is
:math:`a = t - c(i)`, and :math:`A[0,i]` belongs to the unedited model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from prune_lightning.errors import UserError


def age_bin(age: Tensor) -> Tensor:
    """Return the geometric bin of each age: 0, 1, 2-3, 4-7, 8-15, ...

    >>> age_bin(torch.tensor([0, 1, 2, 3, 4, 7, 8])).tolist()
    [0, 1, 2, 2, 3, 3, 4]
    """
    return torch.frexp(age.double()).exponent.clamp_min(0)  # exact, unlike log2 of a power of two


@dataclass(frozen=True)
class Observations:
    r"""Entries of :math:`A`; non-finite ones count as 0.

    Args:
        time: :math:`t` of each entry, shape ``(n,)``.
        commit: :math:`c(i)`.
        case: :math:`i`.
        value: :math:`A[t,i]`.
        superseded: Per case that a later edit overwrites, the edit count from which it does.

    Raises:
        UserError: An entry occurs twice, a case has two commits, or it has later scores but none from right after it
            was written.
    """

    time: Tensor
    commit: Tensor
    case: Tensor
    value: Tensor
    superseded: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = torch.stack([self.time, self.case], 1)
        if len(pairs.unique(dim=0)) != len(pairs):
            raise UserError("an entry of the retention matrix occurs twice: each case is scored once at each count")
        commits = torch.stack([self.case, self.commit], 1).unique(dim=0)
        if len(commits) != len(self.case.unique()):
            raise UserError("a case of the retention matrix has two different commits")
        later = self.case[self.time > self.commit].unique()
        if missing := later[~torch.isin(later, self.case[self.time == self.commit])].tolist():
            raise UserError(f"these cases have no score from right after they were written: {missing[:10]}")
        object.__setattr__(self, "num_nonfinite", int((~torch.isfinite(self.value)).sum()))
        object.__setattr__(self, "value", torch.where(torch.isfinite(self.value), self.value, 0.0).double())

    num_nonfinite = 0

    def at(self, chosen: Tensor) -> Tensor:
        """Return, by case, the value of the chosen entries (one per case); NaN for the other cases."""
        values = torch.full((self._size,), math.nan, dtype=torch.float64, device=self.value.device)
        values[self.case[chosen].long()] = self.value[chosen]
        return values

    @property
    def _size(self) -> int:
        return int(self.case.max()) + 1 if len(self.case) else 0

    @cached_property
    def acquired(self) -> Tensor:
        """:math:`A[c(i), i]` by case."""
        return self.at(self.time == self.commit)

    @cached_property
    def commits(self) -> Tensor:
        """Commits of the cases that were written."""
        return self.commit[self.time == self.commit]

    @cached_property
    def ends(self) -> Tensor:
        """Edit counts from which a later edit overwrites these cases, infinite where none does."""
        cases = self.case[self.time == self.commit].long().tolist()
        found = [float(self.superseded.get(case, math.inf)) for case in cases]
        return torch.tensor(found, device=self.commit.device)

    def written_at(self, t: float, before: bool = False) -> tuple[Tensor, Tensor]:
        """Return the entries of time ``t`` of cases written by then, and their weights.

        If only some cases were scored, those of an age bin represent the whole bin: the weight is the number of cases
        in the bin divided by the number of scored ones.

        Args:
            t: Edit count.
            before: Whether to leave out the cases that were written at ``t`` itself.
        """
        limit = self.commit < t if before else self.commit <= t
        entries = ((self.time == t) & limit).nonzero().flatten()
        population = self.commits[(self.commits < t if before else self.commits <= t) & (self.ends > t)]
        bins = age_bin(t - self.commit[entries]).long()
        everyone = age_bin(t - population).long().bincount(minlength=64).double()
        num_scored = bins.bincount(minlength=64).double()
        return entries, (everyone / num_scored)[bins]


def _mean(values: Tensor, weights: Tensor | None = None) -> float:
    if not len(values):
        return math.nan
    return float(values.mean() if weights is None else (values * weights).sum() / weights.sum())


def acquisition(seen: Observations) -> float:
    r"""Return :math:`AQ = \mathrm{mean}_i A[c(i), i]`: the success right after writing."""
    return _mean(seen.value[seen.time == seen.commit])


def accuracy(seen: Observations, t: float) -> float:
    r"""Return :math:`ACC_t = \mathrm{mean}_i A[t, i]` over all edits written by ``t``."""
    entries, weights = seen.written_at(t)
    return _mean(seen.value[entries], weights)


def backward_transfer(seen: Observations, t: float) -> float:
    r"""Return :math:`BWT(t) = \mathrm{mean}_{c(i) < t} (A[t, i] - A[c(i), i])`; minus the last-vs-first forgetting."""
    entries, weights = seen.written_at(t, before=True)
    return _mean(seen.value[entries] - seen.acquired[seen.case[entries].long()], weights)


def max_forgetting(seen: Observations, t: float) -> float:
    r"""Return the mean of :math:`F^*_i(t) = \max_{c(i) \le s < t} A[s, i] - A[t, i]`."""
    entries, weights = seen.written_at(t, before=True)
    earlier = (seen.time >= seen.commit) & (seen.time < t)
    best = torch.full((seen._size,), -math.inf, dtype=torch.float64, device=seen.value.device)
    best = best.scatter_reduce(0, seen.case[earlier].long(), seen.value[earlier], "amax")
    return _mean(best[seen.case[entries].long()] - seen.value[entries], weights)


def forward_transfer(seen: Observations) -> float:
    r"""Return :math:`FWT = \mathrm{mean}_i (A[c(i)-1, i] - A[0, i])`: the effect of earlier edits on a fact.

    :math:`c(i)-1` is the state just before the step that wrote ``i``. For counterfactual targets any value but 0 means
    contamination.
    """
    before = seen.time < seen.commit
    latest = torch.full((seen._size,), -1.0, dtype=torch.float64, device=seen.value.device)
    latest = latest.scatter_reduce(0, seen.case[before].long(), seen.time[before].double(), "amax")
    just_before = seen.at(before & (seen.time == latest[seen.case.long()]))
    change = (just_before - seen.at(before & (seen.time == 0)))[torch.isfinite(seen.acquired)]
    return _mean(change[torch.isfinite(change)])


@dataclass(frozen=True)
class AgeBin:
    """Retention in one bin of ages.

    Args:
        youngest: Lowest age of the bin.
        oldest: Highest age of the bin.
        age: Mean age of its pairs (case, count).
        pairs: Their number.
        retention: Mean of ``A[t, i]``.
        conditional: The same weighted by ``A[c(i), i]``, i.e. over edits that succeeded when they were written.
        backward_transfer: Mean of ``A[t, i] - A[c(i), i]``.
    """

    youngest: int
    oldest: int
    age: float
    pairs: int
    retention: float
    conditional: float
    backward_transfer: float


def retention_by_age(seen: Observations) -> list[AgeBin]:
    r"""Return :math:`\rho(a)`, :math:`\rho_c(a) = \sum A[t,i] A[c(i),i] / \sum A[c(i),i]` and BWT per bin of ages."""
    after = seen.time >= seen.commit
    ages, now = (seen.time - seen.commit)[after], seen.value[after]
    first = seen.acquired[seen.case[after].long()]
    bins = age_bin(ages)
    result = []
    for number in bins.unique().tolist():
        chosen = bins == number
        a, value, base = ages[chosen].double(), now[chosen], first[chosen]
        held = float((value * base).sum() / base.sum()) if base.sum() > 0 else math.nan
        low, high = (2 ** (number - 1), 2**number - 1) if number else (0, 0)
        row = AgeBin(low, high, _mean(a), len(a), _mean(value), held, _mean(value - base))
        result.append(row)
    return result


@dataclass(frozen=True)
class HalfLife:
    """Age at which retention has halved, or the highest observed age if it has not (right-censored)."""

    age: float
    censored: bool


def half_life(ages: Sequence[float], retention: Sequence[float]) -> HalfLife:
    r"""Return the first age, between two by linear interpolation, with :math:`\rho(a) \le \rho(0)/2`.

    Args:
        ages: Ascending, the first one 0.
        retention: At each age; if all are NaN, or 0 at age 0, the half-life is NaN.

    >>> half_life([0, 2, 4], [1.0, 0.75, 0.25])
    HalfLife(age=3.0, censored=False)
    >>> half_life([0, 2], [1.0, 0.75])
    HalfLife(age=2, censored=True)
    """
    if not ages or not retention[0] > 0:
        return HalfLife(math.nan, False)
    half = retention[0] / 2
    for k in range(1, len(ages)):
        if retention[k] <= half:
            share = (retention[k - 1] - half) / (retention[k - 1] - retention[k])
            return HalfLife(float(ages[k - 1] + share * (ages[k] - ages[k - 1])), False)
    return HalfLife(ages[-1], True)
