"""Evaluates a model: measurements over cases, per-case rows, bootstrap intervals, and retention."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torchmetrics import Metric

from prune_lightning.evaluation.case_rows import CaseRows, resampled
from prune_lightning.evaluation.measurement import Cases, EditingMeasurement, Measured, Measurement, Stream
from prune_lightning.evaluation.retention import Retention
from prune_lightning.evaluation.shown import shown
from prune_lightning.evaluation.stream import StreamScores
from prune_lightning.metrics.bootstrap import Floats, interval
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock

Scores = dict[str, float]
Job = Callable[[], Measured]


class Evaluator:
    """Runs measurements of one model and combines their scores.

    The first evaluation is the baseline, on the unedited model and over all cases that will be evaluated.

    Args:
        measurements: What to measure; those not enabled are left out.
        stream: Metrics over the whole stream, updated in every evaluation but the baseline.
        rows: Collects the rows of every case.
        clock: Measures the time; a new clock by default.

    Attributes:
        baseline: Scores of the unedited model.
        curve: Scores at each evaluated count, ``num_requests`` among them.
        intervals: At each evaluated count, 95 % bootstrap intervals over cases of all scores that have rows.
        seconds: Time spent on each measurement.
        num_cases: Number of cases behind each score that has rows, in the latest evaluation.
        means: Mean of each score that has rows, and its means over resampled cases, in the latest evaluation.
        retention: The tasks that retention is computed from.
    """

    def __init__(
        self,
        measurements: Sequence[Measurement],
        stream: StreamScores | None = None,
        rows: CaseRows | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self.measurements = [measurement for measurement in measurements if measurement.enabled]
        self.stream, self.clock = stream, clock or PhaseClock()
        self.rows = rows or CaseRows(None)
        self.baseline: Scores = {}
        self.curve: list[Scores] = []
        self.intervals: list[dict[str, Any]] = []
        self.num_cases: dict[str, int] = {}
        self.means: dict[str, Floats] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.retention = Retention()
        self._immediate: dict[str, tuple[Metric, list[dict[str, Any]]]] = {}

    def labels(self) -> dict[str, dict[str, Any]]:
        """Return, by measurement, how its scores are shown: see :class:`~prune_lightning.report.labels.Labels`."""
        parts: list[StreamScores | Measurement] = [*([self.stream] if self.stream else []), *self.measurements]
        return {part.name: shown(part) for part in parts}

    def difference(self, other: Evaluator) -> dict[str, list[float]]:
        """Return each score's latest value minus that of another evaluator, and the difference's 95 % interval.

        The same cases are drawn for both, so the interval is that of the paired differences. Scores over different
        numbers of cases are left out.
        """
        shared = [key for key, n in self.num_cases.items() if other.num_cases.get(key) == n and key in other.means]
        value = {key: self.curve[-1][key] - other.curve[-1][key] for key in shared}
        return {key: [value[key], *interval((self.means[key] - other.means[key])[1:])] for key in shared}

    # -- the unedited model ---------------------------------------------------------------------------------------
    def take_baseline(self, model: LanguageModel, cases: Cases, spectrum: Job, stream: Stream | None = None) -> Scores:
        """Measure the unedited model.

        Args:
            model: The unedited model.
            cases: All cases that will be evaluated.
            spectrum: Measures the edited matrices.
            stream: What is going to be edited; nothing by default.
        """
        with self.clock.phase("baseline"):
            for measurement in self.measurements:
                with self._timed(measurement.name):
                    measurement.prepare(stream or Stream())
                    measurement.take_reference(model, cases)
        self.baseline = self.evaluate(model, cases, dict.fromkeys(cases, 1.0), 0, self.measurements, spectrum, 1)
        return self.baseline

    def begin_stream(self, model: LanguageModel, cases: Cases, commits: Sequence[int], max_probes: int | None) -> None:
        """Score the unedited model for the metrics over the whole stream.

        Args:
            model: The unedited model.
            cases: All cases that will be evaluated.
            commits: Edit count at which each case of the stream is written.
            max_probes: Largest number of unrelated probes; ``None`` for all.
        """
        if self.stream is None:
            return
        unrelated = dict.fromkeys(probe for request in cases.values() for probe in request.locality)
        with self.clock.phase("baseline"), self._timed(self.stream.name):
            rows = self.stream.begin(model, cases, commits, list(unrelated)[:max_probes])
        self.rows.add(self.stream.name, 0, rows)

    def share_baseline(self, earlier: Evaluator) -> None:
        """Use the baseline of an evaluation of the same stream with the same measurements."""
        self.baseline, self.retention = earlier.baseline, earlier.retention
        self.intervals = [earlier.intervals[0]]
        self.rows = CaseRows(None, known=earlier.rows.known)

    # -- steps that start from the unedited model ---------------------------------------------------------------
    def begin_immediate(self, device: Any) -> None:
        """From now on, score each request right after its step, and average over the steps."""
        editing = [m for m in self.measurements if isinstance(m, EditingMeasurement)]
        self._immediate = {m.name: (m.metric().to(device), []) for m in editing}

    def score_immediately(self, model: LanguageModel, cases: Cases) -> None:
        """Score the requests of a step, before the unedited model is restored."""
        for m in self.measurements:
            if isinstance(m, EditingMeasurement):
                metric, rows = self._immediate[m.name]
                with self.clock.part("scores"), self._timed(m.name):
                    rows.extend(m.update(metric, model, cases))

    def drop_last(self) -> None:
        """Drop the latest evaluation, before the model is evaluated again at the same count."""
        count = int(self.curve.pop()["num_requests"])
        self.intervals.pop()
        self.retain_rows()
        if self.stream:
            self.stream.drop(count)

    def restore(self, state: Mapping[str, Any], again: bool = False) -> None:
        """Add what was measured in an earlier run.

        Args:
            state: ``scores``, ``intervals`` and those of the ``stream``, as far as there are any.
            again: Whether the stream is to return its scores as fresh ones again.
        """
        if self.stream:
            self.stream.restore(state.get("stream", []), again)
        self.curve += state.get("scores", [])
        self.intervals += state.get("intervals", [])

    def retain_rows(self) -> None:
        """Remove the rows of evaluations that are not in the curve."""
        self.rows.retain({int(entry["num_requests"]) for entry in self.curve})

    # -- an evaluation --------------------------------------------------------------------------------------------
    def evaluate(
        self,
        model: LanguageModel,
        cases: Cases,
        weights: Mapping[int, float],
        num_requests: int,
        due: Sequence[Measurement],
        spectrum: Job,
        rounds: int,
    ) -> Scores:
        """Run one evaluation.

        Args:
            model: The model.
            cases: The cases to score.
            weights: Number of cases that each of them represents.
            num_requests: Requests handled so far.
            due: The measurements to run.
            spectrum: Measures the edited matrices.
            rounds: Number of remaining evaluations, including this one, for the estimate of the time left.
        """
        jobs = list(self._jobs(model, cases, weights, num_requests, due, spectrum))
        parts: dict[str, list[Measured]] = defaultdict(list)
        with model.kept.while_unchanged(), self.clock.phase("evaluate" if num_requests else "baseline") as phase:
            phase.expect(phase.done + len(jobs) * rounds)
            for name, job in phase.track(jobs):
                with self._timed(name):
                    parts[name].append(job())
            with self._timed("rows and intervals"):
                scores = self._joined(parts, weights, num_requests, due)
        self.curve.append({"num_requests": num_requests, **scores})
        return scores

    def _jobs(
        self,
        model: LanguageModel,
        cases: Cases,
        weights: Mapping[int, float],
        num_requests: int,
        due: Sequence[Measurement],
        spectrum: Job,
    ) -> Iterable[tuple[str, Job]]:
        """Yield all jobs, each with the name of its measurement."""
        yield "spectrum", spectrum
        for measurement in due:
            if measurement.name in self._immediate:
                yield measurement.name, partial(self._averaged, measurement)
            else:
                for job in measurement.jobs(model, cases).values():
                    yield measurement.name, job
        if self.stream and num_requests:  # last, since most of its pairs have been scored by then
            yield self.stream.name, partial(self.stream.score, model, cases, num_requests, weights)

    def _averaged(self, measurement: Measurement) -> Measured:
        metric, rows = self._immediate[measurement.name]
        return Measured({name: float(score) for name, score in metric.compute().items()}, rows)

    def _joined(
        self,
        parts: Mapping[str, Sequence[Measured]],
        weights: Mapping[int, float],
        num_requests: int,
        due: Sequence[Measurement],
    ) -> Scores:
        """Combine the parts of each measurement, collect the rows, and compute the intervals."""
        by_place = {m.name: m for m in due if isinstance(m, EditingMeasurement)}
        sampled = any(weight != 1 for weight in weights.values())
        scores: Scores = {}
        means: dict[str, Floats] = {}
        self.num_cases = {}
        for name, found in parts.items():
            rows = [row for part in found for row in part.cases]
            figures = {key: value for part in found for key, value in part.scores.items()}
            if sampled and name in by_place:
                rows = [{**row, "weight": weights[row["case"]]} for row in rows]
            self.rows.add(name, num_requests, rows, asked=weights.keys() if name in {*by_place, "stream"} else None)
            per_case = resampled(rows, figures.keys())
            if sampled and name in by_place:
                figures |= {key: float(values[0]) for key, values in per_case.items()}
                figures |= by_place[name].derived(figures)
            scores |= {f"{name}/{key}": value for key, value in figures.items()}
            means |= {f"{name}/{key}": values for key, values in per_case.items()}
            self.num_cases |= {f"{name}/{key}": sum(_is_number(row.get(key)) for row in rows) for key in per_case}
        if not self.baseline:
            self.retention.decide(due, scores, means)
        self.retention.add(due, scores, means)
        self.num_cases |= self.retention.num_cases(self.num_cases)
        self.means = means
        self.intervals.append({"num_requests": num_requests} | {key: interval(v[1:]) for key, v in means.items()})
        return scores

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))
