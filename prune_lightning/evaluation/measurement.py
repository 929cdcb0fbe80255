"""The interface of measurements of an edited model: a name, scores, and per-case rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torchmetrics import Metric

from prune_lightning.distributed import fail_together
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.questions import PlacedGroup
from prune_lightning.ranges import Whole
from prune_lightning.types import EditRequest
from prune_lightning.value_types import check_value

Cases = Mapping[int, EditRequest]
"""Requests by their index in the stream, from 0."""


class EditedWeight(Protocol):
    """A matrix under edit, ``out_features x in_features``."""

    @property
    def parameter(self) -> nn.Parameter:
        """The live weight."""
        ...

    def original(self) -> Tensor:
        """Return the unedited matrix."""
        ...

    def delta(self) -> Tensor:
        """Return the change of the live weight."""
        ...


@dataclass(frozen=True)
class Stream:
    """What a run is going to edit.

    Args:
        requests: All requests, in order.
        matrices: The matrices under edit, by the name of their weight.
        groups: Edits that belong together and have questions of their own.
    """

    requests: Sequence[EditRequest] = ()
    matrices: Mapping[str, EditedWeight] = field(default_factory=dict)
    groups: Sequence[PlacedGroup] = ()


@dataclass(frozen=True)
class Headline:
    """A score that stands for one of the four quantities of a run: efficacy, generalization, locality, retention.

    Args:
        score: Its key, without the prefix of the measurement's name.
        meaning: What a value of 100 % means, as a sentence.
    """

    score: str
    meaning: str


@dataclass(frozen=True)
class Measured:
    """The result of a measurement, or of a part of one.

    Args:
        scores: Scores by name, without the prefix of the measurement's name.
        cases: One JSON-serializable row per case. ``case`` is its index in the stream, or in the task's items. Every
            other number is the case's contribution to the score of that name, which is the mean over cases.
    """

    scores: Mapping[str, float]
    cases: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


class Measurement(ABC):
    """Measures a language model at given edit counts.

    Args:
        enabled: Whether to run it at all.
        counts: Edit counts at which to run it, besides the baseline and the end; ``None`` for those of the evaluation.

    Attributes:
        name: What stands before each of its scores, the protocol in it: ``edit/counterfact``, ``ability/miniature``.
        title: Name of the measurement for tables and plots; ``name`` if empty.
        labels: Names of its scores for tables and plots, in the order in which they are shown. ``NAME/`` labels the
            scores ``NAME/ANYTHING``. Others go by their key.
        headlines: The scores that stand for efficacy, generalization and locality, by these names.
        short: Keys for a short table, the most important one first, besides ``headlines``.
        lower: Keys of the scores for which lower is better; of other scores with a label, higher is better.
        tasks: Scores, higher being better, that ``retention`` is computed from, each with its chance level: the score
            of guessing, and 0 where the answer is free.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    labels: ClassVar[Mapping[str, str]] = {}
    headlines: ClassVar[Mapping[str, Headline]] = {}
    short: ClassVar[Sequence[str]] = ()
    lower: ClassVar[frozenset[str]] = frozenset()
    tasks: Mapping[str, float] = {}

    def __init__(self, enabled: bool = True, counts: Sequence[Whole] | None = None) -> None:
        check_value(f"`counts` of {type(self).__name__}", counts, Sequence[Whole] | None)
        self.enabled = enabled
        self.counts = None if counts is None else sorted(set(counts) - {0})

    def prepare(self, stream: Stream) -> None:  # noqa: B027 - few need it
        """Look at what is going to be edited. Called once, before :meth:`take_reference`."""

    def facts(self) -> Mapping[str, Any]:
        """Return what the run's summary says about the measurement, besides its scores, JSON-serializable."""
        return {}

    def remarks(self) -> list[str]:
        """Return sentences for the report, such as on items that are left out."""
        return []

    def check(self, model: LanguageModel, requests: Sequence[EditRequest]) -> None:  # noqa: B027 - few have to
        """Raise what is known to prevent the measurement; called before anything is computed.

        Args:
            model: The unedited model.
            requests: The stream's requests.
        """

    def take_reference(self, model: LanguageModel, cases: Cases) -> None:  # noqa: B027 - few need one
        """Keep reference results of the unedited model. Called once, before the baseline.

        Args:
            model: The unedited model.
            cases: All cases that will be evaluated.
        """

    @abstractmethod
    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the parts of the measurement, by a name for the progress display.

        Args:
            model: The model to measure.
            cases: The cases to score; measurements of abilities ignore them.
        """

    def measure(self, model: LanguageModel, cases: Cases | None = None) -> Measured:
        """Run the whole measurement at once; see :meth:`jobs`."""
        parts = [job() for job in self.jobs(model, cases or {}).values()]
        scores = {name: score for part in parts for name, score in part.scores.items()}
        return Measured(scores, [row for part in parts for row in part.cases])


class EditingMeasurement(Measurement):
    """Scores edit requests and adds the scores to a metric.

    Under the protocols that restore the unedited model after each step, one metric is updated step by step.
    """

    @abstractmethod
    def metric(self) -> Metric:
        """Return a new metric, which computes a dict of scores."""

    @abstractmethod
    def update(self, metric: Metric, model: LanguageModel, cases: Cases) -> list[dict[str, Any]]:
        """Score cases, add them to the metric, and return their rows."""

    def derived(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the scores that are computed from other scores, such as a harmonic mean; none by default.

        Args:
            means: Scores that are means over cases, each case weighted by the number of cases that it represents.
        """
        return {}

    def jobs(self, model: LanguageModel, cases: Cases) -> Mapping[str, Callable[[], Measured]]:
        """Return the one job."""
        return {self.name: partial(self._measure, model, cases)}

    def _measure(self, model: LanguageModel, cases: Cases) -> Measured:
        metric = self.metric().to(model.device)
        with fail_together():  # compute() communicates
            rows = self.update(metric, model, cases)
        return Measured({name: float(value) for name, value in metric.compute().items()}, rows)
