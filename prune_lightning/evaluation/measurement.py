"""What a measurement of an edited model is: a name that says its protocol, scores, and per-case rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torchmetrics import Metric

from prune_lightning.distributed import fail_together
from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest

Cases = Mapping[int, EditRequest]
"""Requests by their place in the stream, counted from 0."""


@dataclass(frozen=True)
class Measured:
    """The outcome of a measurement, or of a part of one.

    Args:
        scores: By name; the measurement's own name goes in front.
        cases: One JSON-able row per case. ``case`` is its place in the stream, or in the task's items; every other
            number is that case's part of the score of the same name, which is the mean over cases.
    """

    scores: Mapping[str, float]
    cases: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


class Measurement(ABC):
    """Measures a language model, at its own cadence.

    Args:
        enabled: Whether it is taken at all; one that is not costs nothing.
        counts: Edit counts at which it is taken, besides the baseline and the end; ``None`` for the evaluation's own.

    Attributes:
        name: What stands before each of its scores, the protocol in it: ``edit/counterfact``, ``ability/miniature``.
        title: Name of the measurement for tables and plots; ``name`` if empty.
        labels: Names of its scores for tables and plots, in the order in which they are shown. Others go by their key.
        tasks: Scores, higher being better, whose mean ratio to the baseline is reported as ``retention``.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    labels: ClassVar[Mapping[str, str]] = {}
    tasks: Sequence[str] = ()

    def __init__(self, enabled: bool = True, counts: Sequence[int] | None = None) -> None:
        if counts is not None and any(not isinstance(count, int) or count < 0 for count in counts):
            raise UserError(f"`counts` of {type(self).__name__} is expected to be edit counts, but got {list(counts)}")
        self.enabled = enabled
        self.counts = None if counts is None else sorted(set(counts) - {0})

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:  # noqa: B027 - few need one
        """Keep what later measurements compare with; called once, on the unedited model, before the baseline.

        Args:
            model: The unedited model.
            cases: All cases that will ever be asked for.
        """

    @abstractmethod
    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the parts of the measurement, by a name for the progress display.

        Args:
            model: The model to measure.
            cases: The cases to score; measurements of abilities have no use for them.
        """

    def measure(self, model: LanguageModel, cases: Cases | None = None) -> Measured:
        """Take the whole measurement at once; see :meth:`jobs`."""
        parts = [job() for job in self.jobs(model, cases or {}).values()]
        scores = {name: score for part in parts for name, score in part.scores.items()}
        return Measured(scores, [row for part in parts for row in part.cases])


class EditingMeasurement(Measurement):
    """Scores edit requests into a metric that knows no model.

    Under the protocols that go back to the unedited model after each step, one metric is updated step by step.
    """

    @abstractmethod
    def metric(self) -> Metric:
        """Return a fresh metric; it computes a dict of scores."""

    @abstractmethod
    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Score cases, add them to the metric, and return their rows."""

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the one job."""
        return {self.name: partial(self._measure, model, cases)}

    def _measure(self, model: LanguageModel, cases: Cases) -> Measured:
        metric = self.metric().to(model.device)
        with fail_together():  # computing communicates
            rows = self.update(metric, model, cases)
        return Measured({name: float(value) for name, value in metric.compute().items()}, rows)
