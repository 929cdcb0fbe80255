"""The prompts of edit requests by kind, and the base of the measurements that score them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from prune_lightning.evaluation.measurement import Cases, EditingMeasurement
from prune_lightning.evaluation.pair_scores import PairScores
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Whole
from prune_lightning.text.separators import TextPair
from prune_lightning.types import EditRequest

Pairs = list[TextPair]
T = TypeVar("T")


def edit_pair(request: EditRequest) -> Pairs:
    """Return the edit's own prompt with its new target."""
    return [request.pair()]


def paraphrase_pairs(request: EditRequest) -> Pairs:
    """Return the paraphrases with the new target."""
    return request.paraphrase_pairs()


def locality_pairs(request: EditRequest) -> Pairs:
    """Return the prompts that the edit should not change, with their own answers."""
    return [probe.pair() for probe in request.locality if probe.answer]


def portability_pairs(request: EditRequest) -> Pairs:
    """Return the questions about consequences of the edit, with their answers."""
    return [probe.pair() for probe in request.portability if probe.answer]


def score_kinds(
    model: LanguageModel, cases: Cases, kinds: Mapping[str, Callable[[EditRequest], Pairs]]
) -> Iterator[tuple[str, PairScores, Tensor]]:
    """Score all kinds of pairs in one pass; yield each kind's scores, and the case of each score.

    Args:
        model: The language model.
        cases: Requests to score.
        kinds: The pairs of a request, by kind.
    """
    flat = [(kind, case, pair) for kind, pairs in kinds.items() for case, r in cases.items() for pair in pairs(r)]
    scores = score_pairs(model, [pair for _, _, pair in flat])
    owner = torch.tensor([case for _, case, _ in flat], dtype=torch.long, device=model.device)
    for kind in kinds:
        here = torch.tensor([i for i, (k, _, _) in enumerate(flat) if k == kind], dtype=torch.long, device=model.device)
        yield kind, scores[here], owner[here]


class SampledMeasurement(EditingMeasurement):
    """A measurement of a fixed subset of the cases, spread evenly over the stream.

    Args:
        max_cases: Number of cases; ``None`` for all.
        enabled: See :class:`Measurement`.
        counts: See :class:`Measurement`.
    """

    def __init__(
        self, max_cases: Count | None = None, enabled: bool = True, counts: Sequence[Whole] | None = None
    ) -> None:
        super().__init__(enabled, counts)
        self.max_cases = max_cases
        self._places: frozenset[int] | None = None

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:
        """Choose the cases."""
        self._places = frozenset(spread(sorted(cases), self.max_cases))

    def chosen(self, cases: Cases) -> Cases:
        """Return the measured ones among some cases."""
        places = frozenset(spread(sorted(cases), self.max_cases)) if self._places is None else self._places
        return {place: request for place, request in cases.items() if place in places}


def spread(places: Sequence[T], count: int | None) -> list[T]:
    """Return ``count`` evenly spread places, including the first and the last; ``None`` for all.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if count is None or count >= len(places):
        return list(places)
    step = (len(places) - 1) / max(count - 1, 1)
    return [places[round(i * step)] for i in range(count)]


def comparable(model: LanguageModel, cases: Cases) -> Iterator[Cases]:
    """Yield cases in the batches in which a model has to run to be compared with the unedited model.

    In half precision a first choice can depend on the other rows of the batch, so each case is run by itself before and
    after, also if another measurement has had the same prompts. Otherwise all are run together.
    """
    if torch.finfo(model.model.dtype).bits >= 32:
        yield cases
        return
    for place, request in cases.items():
        with model.kept.nothing():
            yield {place: request}
