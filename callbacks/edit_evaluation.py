"""Evaluates an edited model before the first edit and at chosen edit counts, over the edits so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torchmetrics import Metric
from typing_extensions import override

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.evaluation.case_rows import CaseRows, resampled
from prune_lightning.evaluation.case_sampler import CaseSampler
from prune_lightning.evaluation.measurement import Cases, EditingMeasurement, Measured, Measurement
from prune_lightning.evaluation.stream import StreamScores
from prune_lightning.methods.base import EditingModule
from prune_lightning.metrics.bootstrap import Floats, interval
from prune_lightning.metrics.functional import retention
from prune_lightning.phases import Phase
from prune_lightning.types import EditBatch, EditRequest

from ._measuring import edited_spectrum, timed
from .edit_log import EditLog

Scores = dict[str, float]
Job = Callable[[], Measured]


class EditEvaluation(L.Callback):
    """Takes measurements along the stream, each at its own cadence, and the edited matrices' spectra.

    The baseline is taken on the unedited model over all cases that will be looked at; afterwards the scores are over
    the requests written so far, or over a sample of them in strata of age, whose cases then weigh as many as they stand
    for. Under the protocols ``single`` and ``batch`` each step's requests are scored right after it, before the model
    is put back, and averaged. Every process measures everything, and the first one writes.

    Args:
        counts: Edit counts at which to evaluate; the last edit is always evaluated.
        measurements: What to measure; those not enabled are left out.
        edit_log: The run's edit log, listed before this callback: its scores of each request just before and just after
            the edit are shared, and metrics over the whole stream are taken.
        max_cases: Most requests to look at at a time; see :class:`CaseSampler`.
        seed: Seed of the sample.
        cases_file: JSONL file for per-case rows.
        max_case_mb: See :class:`CaseRows`.
        earlier: An evaluation of the same stream with the same measurements, whose baseline is taken over.

    Attributes:
        baseline: Scores of the unedited model.
        curve: Scores at each evaluated count, ``num_edits`` among them.
        intervals: At each evaluated count, 95 % bootstrap intervals over cases of all scores that have rows.
        seconds: Time spent on each measurement.
        case_rows: What became of the per-case rows.
        stream: Metrics over the whole stream; ``None`` without a log, or where steps go back to the unedited model.
    """

    def __init__(
        self,
        counts: Sequence[int],
        measurements: Sequence[Measurement] = (),
        edit_log: EditLog | None = None,
        max_cases: int | None = None,
        seed: int = 0,
        cases_file: Path | None = None,
        max_case_mb: float | None = None,
        earlier: EditEvaluation | None = None,
    ) -> None:
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise UserError(f"evaluation.counts is expected to be edit counts, but got {list(counts)}")
        self.counts = sorted(set(counts) - {0})
        self.measurements = [measurement for measurement in measurements if measurement.enabled]
        self.edit_log, self.max_cases, self.seed = edit_log, max_cases, seed
        self.cases_file, self.max_case_mb = cases_file, max_case_mb
        self.case_rows: CaseRows = CaseRows(None, known=earlier.case_rows.known if earlier else None)
        self.baseline: Scores = earlier.baseline if earlier else {}
        self._resampled_baseline: dict[str, Floats] = earlier._resampled_baseline if earlier else {}
        self.curve: list[Scores] = []
        self.intervals: list[dict[str, Any]] = [earlier.intervals[0]] if earlier else []
        self.seconds: dict[str, float] = defaultdict(float)
        self.stream: StreamScores | None = None
        self._requests: list[EditRequest] = []
        self._probed: dict[int, float] = {}
        self._immediate: dict[str, tuple[Metric, list[dict[str, Any]]]] = {}
        self._evaluations = 0
        self._told = 1  # entries of the curve; the baseline is taken anew in a resumed run

    # -- what one evaluation is -----------------------------------------------------------------------------------
    def evaluate(
        self, module: EditingModule, weights: Mapping[int, float], num_edits: int, due: Sequence[Measurement]
    ) -> Scores:
        """Run one evaluation.

        Args:
            module: The editing module.
            weights: The cases to score, and how many cases each of them stands for.
            num_edits: Edits written so far.
            due: What to take.
        """
        with module.phase_clock.phase("evaluate" if num_edits else "baseline") as phase:
            return self._evaluate(module, weights, num_edits, due, phase)

    def _evaluate(
        self,
        module: EditingModule,
        weights: Mapping[int, float],
        num_edits: int,
        due: Sequence[Measurement],
        phase: Phase,
    ) -> Scores:
        cases = {i: self._requests[i] for i in weights}
        jobs = list(self._jobs(module, cases, weights, num_edits, due))
        parts: dict[str, list[Measured]] = defaultdict(list)
        phase.expect(phase.done + len(jobs) * max(1, self._evaluations if num_edits else 1))
        self._evaluations -= bool(num_edits)
        with module.evaluation_view():
            for name, job in phase.track(jobs):
                with timed(self.seconds, name):
                    parts[name].append(job())
        with timed(self.seconds, "rows and intervals"):
            return self._joined(parts, weights, num_edits, due)

    def _joined(
        self,
        parts: Mapping[str, Sequence[Measured]],
        weights: Mapping[int, float],
        num_edits: int,
        due: Sequence[Measurement],
    ) -> Scores:
        """Put the parts of each measurement together, keep the rows, and take the intervals."""
        by_place = {m.name for m in due if isinstance(m, EditingMeasurement)}
        sampled = any(weight != 1 for weight in weights.values())
        scores: Scores = {}
        means: dict[str, Floats] = {}
        for name, found in parts.items():
            rows = [row for part in found for row in part.cases]
            figures = {key: value for part in found for key, value in part.scores.items()}
            if sampled and name in by_place:
                rows = [{**row, "weight": weights[row["case"]]} for row in rows]
            self.case_rows.add(name, num_edits, rows, asked=weights.keys() if name in by_place | {"stream"} else None)
            per_case = resampled(rows, figures.keys())
            if sampled and name in by_place:
                figures |= {key: float(values[0]) for key, values in per_case.items()}
            scores |= {f"{name}/{key}": value for key, value in figures.items()}
            means |= {f"{name}/{key}": values for key, values in per_case.items()}
        self._retain(scores, means, due)
        self.intervals.append({"num_edits": num_edits} | {key: interval(v[1:]) for key, v in means.items()})
        return scores

    def _jobs(
        self,
        module: EditingModule,
        cases: Cases,
        weights: Mapping[int, float],
        num_edits: int,
        due: Sequence[Measurement],
    ) -> Iterable[tuple[str, Job]]:
        """Yield everything there is to do, each with the name of its measurement."""
        yield "spectrum", partial(edited_spectrum, module)
        if self.stream and num_edits:
            yield self.stream.name, partial(self.stream.look, module.language_model, cases, num_edits, weights)
        for measurement in due:
            if measurement.name in self._immediate:
                yield measurement.name, partial(self._immediately, measurement)
            else:
                for job in measurement.jobs(module.language_model, cases).values():
                    yield measurement.name, job

    def _immediately(self, measurement: Measurement) -> Measured:
        metric, rows = self._immediate[measurement.name]
        return Measured({name: float(score) for name, score in metric.compute().items()}, rows)

    def _retain(self, scores: Scores, means: dict[str, Floats], due: Sequence[Measurement]) -> None:
        """Add what is left of each group of tasks, relative to the baseline."""
        before, resampled_before = self.baseline or scores, self._resampled_baseline or means
        for measurement in due:
            keys = [f"{measurement.name}/{task}" for task in measurement.tasks]
            if keys:
                name = f"{measurement.name}/retention"
                scores[name] = retention(scores, {key: before[key] for key in keys})
                kept = [key for key in keys if before[key] > 0]
                if kept and all(key in means and key in resampled_before for key in kept):
                    shares = [means[key] / np.maximum(resampled_before[key], 1e-12) for key in kept]
                    means[name] = np.mean(shares, axis=0)
        self._resampled_baseline = resampled_before

    # -- when it happens ------------------------------------------------------------------------------------------
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the cases to look at and take the baseline."""
        with _editing_module(pl_module).phase_clock.phase("baseline"):
            self._begin(trainer, _editing_module(pl_module), _stream(trainer))

    def _begin(self, trainer: L.Trainer, module: EditingModule, stream: EditStream) -> None:
        self._requests = stream.requests
        sizes = [len(batch.requests) for batch in stream.batches()]
        ends = list(accumulate(sizes))
        commits = [end for end, size in zip(ends, sizes, strict=True) for _ in range(size)]
        from_base = stream.protocol.from_base
        self.sampler = CaseSampler(commits, None if from_base else self.max_cases, self.seed)
        planned = [
            end
            for start, end in zip([0, *ends], ends, strict=False)
            if self._due(start, end, end == ends[-1]) is not None
        ]
        self._evaluations = sum(end > stream.skip for end in planned)
        self._probed = {i: 1.0 for end in planned for i in self.sampler.chosen(end)} | dict.fromkeys(
            range(ends[0]), 1.0
        )
        self._probed = dict(sorted(self._probed.items()))
        if self.cases_file and trainer.is_global_zero:
            self.case_rows = CaseRows(self.cases_file, self.max_case_mb, self.case_rows.known, stream.skip)
        cases = {i: self._requests[i] for i in self._probed}
        self.stream = StreamScores() if self.edit_log and not from_base else None
        if not self.baseline:
            for measurement in self.measurements:
                with timed(self.seconds, measurement.name):
                    measurement.take_reference(module.language_model, cases)
            self.baseline = self.evaluate(module, self._probed, 0, self.measurements)
        self._record(trainer, 0, self.baseline)
        if self.stream and self.edit_log:
            unrelated = dict.fromkeys(probe for request in cases.values() for probe in request.locality)
            with timed(self.seconds, self.stream.name):
                rows = self.stream.begin(module.language_model, cases, commits, list(unrelated)[: self.max_cases])
            self.case_rows.add(self.stream.name, 0, rows)
            self.edit_log.stream = self.stream
        if from_base:
            editing = [m for m in self.measurements if isinstance(m, EditingMeasurement)]
            self._immediate = {m.name: (m.metric().to(module.device), []) for m in editing}

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Evaluate if this batch reached one of the counts, or is the last one."""
        module = _editing_module(pl_module)
        before = module.num_edits - len(batch.requests)
        if self._immediate:
            cases = dict(enumerate(batch.requests, start=before))
            with module.phase_clock.part("scores"), module.evaluation_view():
                for m in self.measurements:
                    if isinstance(m, EditingMeasurement):
                        metric, rows = self._immediate[m.name]
                        with timed(self.seconds, m.name):
                            rows.extend(m.update(metric, module.language_model, cases))
        due = self._due(before, module.num_edits, trainer.is_last_batch)
        if due is not None:
            weights = self.sampler.chosen(module.num_edits)
            self._record(trainer, module.num_edits, self.evaluate(module, weights, module.num_edits, due))

    def _due(self, before: int, now: int, last: bool) -> list[Measurement] | None:
        """Return what to take once ``now`` edits are done, ``before`` of them before the latest step.

        ``None`` if there is no evaluation; the metrics over the stream are part of each.
        """

        def reached(counts: Sequence[int]) -> bool:
            return last or any(before < count <= now for count in counts)

        due = [m for m in self.measurements if reached(self.counts if m.counts is None else m.counts)]
        return due if due or reached(self.counts) else None

    def step(self) -> dict[str, Any]:
        """Return what was measured since this was called last."""
        fresh = self.stream.fresh() if self.stream else []
        measured = {"scores": self.curve[self._told :], "intervals": self.intervals[self._told :]}
        self._told = len(self.curve)
        return {"stream": fresh} | (measured if measured["scores"] else {})

    def take_up(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was measured in earlier steps."""
        if self._immediate:
            raise UserError("a stream whose steps go back to the unedited model is not resumed: run it anew")
        for step in steps:
            if self.stream:
                self.stream.take_up(step["stream"])
            self.curve += step.get("scores", [])
            self.intervals += step.get("intervals", [])
        self._told = len(self.curve)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the final model if the stream was ended early, over cases that were looked at before."""
        module = _editing_module(pl_module)
        if module.num_edits and not self._immediate and self.curve[-1]["num_edits"] != module.num_edits:
            weights = self.sampler.chosen(module.num_edits, among=self._probed)
            scores = self.evaluate(module, weights, module.num_edits, self.measurements)
            self._record(trainer, module.num_edits, scores)

    def _record(self, trainer: L.Trainer, num_edits: int, scores: Scores) -> None:
        self.curve.append({"num_edits": num_edits, **scores})
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=num_edits)


def _editing_module(module: L.LightningModule) -> EditingModule:
    if not isinstance(module, EditingModule):
        raise UserError(f"EditEvaluation evaluates editing modules, but got {type(module).__name__}")
    return module


def _stream(trainer: L.Trainer) -> EditStream:
    return trainer.datamodule  # type: ignore[attr-defined]
