"""torchmetrics over a stream of edits. The formulas are in `stream_functional` and `trajectory`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prune_lightning.metrics import stream_functional as formulas
from prune_lightning.metrics.stream_functional import AgeBin, Observations
from prune_lightning.metrics.trajectory import area, collapse, relative


class RetentionMatrix(Metric):
    r"""The matrix :math:`A[t,i]` of the score of edit ``i`` after ``t`` edits, and the figures derived from it.

    An entry with ``t`` equal to the commit is the immediate score; one with a smaller ``t`` is of a model before the
    edit. Processes may hold different entries; a duplicate entry is an error in :meth:`compute`. A later edit can give
    the same prompt another target; from then on the earlier edit counts neither as retained nor as forgotten.

    Args:
        superseded: Per case that a later edit overwrites, the edit count from which it does. Its later entries are
            dropped and do not count in any mean.
        kwargs: See ``Metric``.

    Examples:
        >>> metric = RetentionMatrix()
        >>> metric.update(1, torch.tensor([1]), torch.tensor([0]), torch.tensor([1.0]))
        >>> metric.update(2, torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
        >>> {key: float(metric.compute()[key]) for key in ("acquisition", "final", "bwt")}
        {'acquisition': 1.0, 'final': 0.5, 'bwt': -1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    time: list[Tensor]
    commit: list[Tensor]
    index: list[Tensor]
    value: list[Tensor]

    def __init__(self, superseded: Mapping[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.superseded = dict(superseded or {})
        for name in ("time", "commit", "index", "value"):
            self.add_state(name, [], dist_reduce_fx="cat")  # all of one float dtype, with which an empty process pads

    def update(self, num_requests: int, commit: Tensor, index: Tensor, value: Tensor) -> None:
        """Add the scores of some cases after ``num_requests`` edits.

        Args:
            num_requests: :math:`t`.
            commit: Edit count at which each case's batch was written, shape ``(n,)``.
            index: Index of each case in the stream, below 2^24.
            value: In [0, 1]; non-finite values count as 0.
        """
        ends = [self.superseded.get(case, math.inf) for case in index.long().tolist()]
        holds = torch.tensor([num_requests < end for end in ends], dtype=torch.bool)
        self.time.append(torch.full((int(holds.sum()),), float(num_requests), device=self.device))
        for state, given in ((self.commit, commit), (self.index, index), (self.value, value)):
            state.append(given[holds.to(given.device)].to(self.device, torch.float32))

    def drop(self, num_requests: int) -> None:
        """Remove the scores of earlier cases at a count, before they are scored there again."""
        for place, (time, commit) in enumerate(zip(self.time, self.commit, strict=True)):
            kept = (time != num_requests) | (commit == num_requests)
            for state in (self.time, self.commit, self.index, self.value):
                state[place] = state[place][kept]

    def observations(self) -> Observations:
        """Return all entries.

        Raises:
            UserError: An entry occurs twice, or a case was never scored right after it was written.
        """
        states = (self.time, self.commit, self.index, self.value)
        time, commit, case, value = (dim_zero_cat(state) if len(state) else torch.zeros(0) for state in states)
        return Observations(time, commit, case, value, self.superseded)

    def by_age(self) -> list[AgeBin]:
        """Return retention in geometric bins of age, from this process's entries."""
        return formulas.retention_by_age(self.observations())

    def compute(self) -> dict[str, Tensor]:
        """Return the figures at the last count: ``acquisition``, ``final``, ``forgetting`` and so on.

        ``half_life`` is the highest observed age if ``half_life_censored`` is 1.
        """
        seen = self.observations()
        last = float(seen.time.max()) if len(seen.time) else math.nan
        backward = formulas.backward_transfer(seen, last)
        bins = formulas.retention_by_age(seen)
        half = formulas.half_life([row.age for row in bins], [row.retention for row in bins])
        figures = {
            "acquisition": formulas.acquisition(seen),
            "final": formulas.accuracy(seen, last),
            "forgetting": 0.0 - backward,
            "forgetting_max": formulas.max_forgetting(seen, last),
            "bwt": backward,
            "fwt": formulas.forward_transfer(seen),
            "half_life": half.age,
            "half_life_censored": float(half.censored),
            "num_nonfinite": float(seen.num_nonfinite),
        }
        return {name: torch.tensor(figure, dtype=torch.float64, device=self.device) for name, figure in figures.items()}


class AbilityCurve(Metric):
    r"""A score along the stream relative to the unedited model's: area under the curve and edits to collapse.

    Update it in one process only; it does not synchronise.

    Args:
        threshold: A model with :math:`g(t)` at or below this counts as collapsed.
        persistence: Number of consecutive collapsed checkpoints that is required.
        chance: Score of guessing, subtracted from both.
        kwargs: See ``Metric``.

    Examples:
        >>> metric = AbilityCurve()
        >>> for num_requests, score in ((0, 0.8), (10, 0.4), (20, float("nan"))):
        ...     metric.update(num_requests, score)
        >>> {name: float(figure) for name, figure in metric.compute().items()}
        {'area': 0.5, 'area_log': 0.6438048284826281, 'edits_to_collapse': 10.0, 'num_nonfinite': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: list[Tensor]
    scores: list[Tensor]

    def __init__(self, threshold: float = 0.5, persistence: int = 2, chance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**({"sync_on_compute": False} | kwargs))
        self.threshold, self.persistence, self.chance = threshold, persistence, chance
        self.add_state("counts", [], dist_reduce_fx="cat")
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, num_requests: int, score: float) -> None:
        """Add the score after ``num_requests`` edits; the lowest count is the unedited model's."""
        self.counts.append(torch.tensor([num_requests], device=self.device))
        self.scores.append(torch.tensor([score], dtype=torch.float64, device=self.device))

    def curve(self) -> tuple[Tensor, Tensor]:
        """Return the edit counts, ascending, and :math:`g(t)`."""
        order = dim_zero_cat(self.counts).argsort()
        scores = dim_zero_cat(self.scores)[order]
        return dim_zero_cat(self.counts)[order], relative(scores, float(scores[0]), self.chance)

    def compute(self) -> dict[str, Tensor]:
        """Return ``area``, ``area_log`` and ``edits_to_collapse``, which is infinite without a collapse."""
        counts, shares = self.curve()
        found = collapse(counts.tolist(), (shares <= self.threshold).tolist(), self.persistence)
        figures = {
            "area": area(counts, shares),
            "area_log": area(counts, shares, log=True),
            "edits_to_collapse": math.inf if found is None else float(found),
            "num_nonfinite": float((~torch.isfinite(dim_zero_cat(self.scores))).sum()),
        }
        return {name: torch.tensor(figure, dtype=torch.float64, device=self.device) for name, figure in figures.items()}
