"""Chooses which edits to evaluate in a long stream: a sample stratified by age."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

import torch

from prune_lightning.errors import UserError
from prune_lightning.metrics.stream_functional import age_bin


class CaseSampler:
    """Chooses the cases to evaluate from those written so far.

    Args:
        commits: Edit count at which each case of the stream is written.
        max_cases: Largest number of cases; ``None`` for all. All of the last batch and one case of every age bin are
            always included, even if that is more.
        seed: Seed of the sample. The same cases are chosen again as long as possible.
        superseded: Per case that a later edit overwrites, the edit count from which it is not evaluated any more.

    Raises:
        UserError: ``max_cases`` is less than 1.
    """

    def __init__(
        self,
        commits: Sequence[int],
        max_cases: int | None = None,
        seed: int = 0,
        superseded: Mapping[int, int] | None = None,
    ) -> None:
        if max_cases is not None and (not isinstance(max_cases, int) or max_cases < 1):
            raise UserError(f"evaluation.max_cases is expected to be a number of cases or null, but got {max_cases!r}")
        self.commits, self.max_cases, self.superseded = list(commits), max_cases, dict(superseded or {})
        self._rank = list(range(len(self.commits)))
        random.Random(seed).shuffle(self._rank)

    def strata(self, num_requests: int, among: Collection[int] | None = None) -> list[list[int]]:
        """Return the cases written by ``num_requests`` in bins of age 0, 1, 2-3, 4-7, ..., youngest first.

        Args:
            num_requests: Edits written so far.
            among: Leave out all other cases.
        """
        held = [i for i, c in enumerate(self.commits) if c <= num_requests < self.superseded.get(i, num_requests + 1)]
        written = [i for i in held if among is None or i in among]
        bins: dict[int, list[int]] = {}
        ages = torch.tensor([num_requests - self.commits[i] for i in written])
        for i, number in zip(written, age_bin(ages).tolist(), strict=True):
            bins.setdefault(number, []).append(i)
        return [bins[number] for number in sorted(bins)]

    def chosen(self, num_requests: int, among: Collection[int] | None = None) -> dict[int, float]:
        """Return the cases to evaluate, ascending, each with the number of cases that it represents.

        Args:
            num_requests: Edits written so far.
            among: Leave out all other cases.
        """
        strata = self.strata(num_requests, among)
        left = sum(map(len, strata)) if self.max_cases is None else self.max_cases
        weights: dict[int, float] = {}
        last = [bin_ for bin_ in strata if self.commits[bin_[0]] == num_requests]
        others = sorted((bin_ for bin_ in strata if bin_ not in last), key=len)
        for place, bin_ in enumerate(last + others):  # small bins first, so that larger ones get what they leave
            share = len(bin_) if bin_ in last else max(1, left // (len(last) + len(others) - place))
            taken = sorted(bin_, key=self._rank.__getitem__)[:share]
            left = max(0, left - len(taken))
            weights |= {i: len(bin_) / len(taken) for i in taken}
        return dict(sorted(weights.items()))
