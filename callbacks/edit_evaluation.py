"""Evaluates an edited model before the first edit and at chosen edit counts, over all edits so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
from torchmetrics import Metric
from typing_extensions import override

from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.evaluation.measurement import Cases, EditingMeasurement, Measured, Measurement
from prune_lightning.methods.base import EditingModule
from prune_lightning.metrics.functional import retention
from prune_lightning.spectral import condition_number, sigma_max
from prune_lightning.types import EditBatch, EditRequest

Scores = dict[str, float]


class EditEvaluation(L.Callback):
    """Takes measurements along the stream, each at its own cadence, and the edited matrices' spectra.

    The baseline is taken on the unedited model over the requests of the whole stream; afterwards the scores are over
    all requests written so far. Under the protocols ``single`` and ``batch`` each step's requests are scored right
    after it, before the model is put back, and averaged.

    Args:
        counts: Edit counts at which to evaluate; the last edit is always evaluated.
        measurements: What to measure; those not enabled are left out.
        baseline: Scores of the unedited model, if they were taken before with the same measurements.

    Attributes:
        baseline: Scores of the unedited model.
        curve: Scores at each evaluated count, ``num_edits`` among them.
        seconds: Time spent here.
    """

    def __init__(
        self, counts: Sequence[int], measurements: Sequence[Measurement] = (), baseline: Scores | None = None
    ) -> None:
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise UserError(f"evaluation.counts is expected to be edit counts, but got {list(counts)}")
        self.counts = sorted(set(counts) - {0})
        self.measurements = [measurement for measurement in measurements if measurement.enabled]
        self.baseline: Scores = baseline or {}
        self.curve: list[Scores] = []
        self.seconds = 0.0
        self._written: dict[int, EditRequest] = {}
        self._immediate: dict[str, Metric] = {}
        self._evaluations = 0

    # -- what one evaluation is -----------------------------------------------------------------------------------
    def evaluate(
        self, module: EditingModule, cases: Cases, phase: str, measurements: Sequence[Measurement], rounds: int = 1
    ) -> Scores:
        """Run one evaluation.

        Args:
            module: The editing module.
            cases: Requests to score.
            phase: Name under which progress is shown.
            measurements: What to take.
            rounds: Evaluations of this phase that the whole run makes.
        """
        start = time.perf_counter()
        jobs: dict[str, Callable[[], Scores]] = {"spectrum": partial(self._spectrum, module)}
        for measurement in measurements:
            if measurement.name in self._immediate:
                jobs[measurement.name] = partial(self._immediately, measurement)
            else:
                for name, job in measurement.jobs(module.language_model, cases).items():
                    jobs[name] = partial(self._part, measurement, job)
        scores: Scores = {}
        with module.evaluation_view():
            for name in module.track(list(jobs), phase, len(jobs) * rounds):
                scores |= jobs[name]()
        for measurement in measurements:
            if measurement.tasks:
                keys = [f"{measurement.name}/{task}" for task in measurement.tasks]
                before = self.baseline or scores
                scores[f"{measurement.name}/retention"] = retention(scores, {key: before[key] for key in keys})
        self.seconds += time.perf_counter() - start
        return scores

    @staticmethod
    def _part(measurement: Measurement, job: Callable[[], Measured]) -> Scores:
        return {f"{measurement.name}/{name}": score for name, score in job().scores.items()}

    def _immediately(self, measurement: Measurement) -> Scores:
        scores = self._immediate[measurement.name].compute()
        return {f"{measurement.name}/{name}": float(score) for name, score in scores.items()}

    @staticmethod
    def _spectrum(module: EditingModule) -> Scores:
        matrices = module.edited_matrices().values()
        return {
            "spectrum/sigma_max_delta": max(sigma_max(matrix.delta()) for matrix in matrices),
            "spectrum/condition_number": max(condition_number(matrix.weight()) for matrix in matrices),
        }

    # -- when it happens ------------------------------------------------------------------------------------------
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the baseline."""
        module = _editing_module(pl_module)
        stream = _stream(trainer)
        cases = dict(enumerate(stream.requests))
        counts = self.counts + [count for measurement in self.measurements for count in measurement.counts or ()]
        self._evaluations = len({count for count in counts if count < len(cases)} | {len(cases)})
        if not self.baseline:
            for measurement in self.measurements:
                measurement.take_reference(module.language_model, cases)
            self.baseline = self.evaluate(module, cases, "baseline", self.measurements)
        self._record(trainer, 0, self.baseline)
        if stream.protocol.from_base:
            editing = [m for m in self.measurements if isinstance(m, EditingMeasurement)]
            self._immediate = {m.name: m.metric().to(module.device) for m in editing}

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Evaluate if this batch reached one of the counts, or is the last one."""
        module = _editing_module(pl_module)
        before = module.num_edits - len(batch.requests)
        cases = dict(enumerate(batch.requests, start=before))
        self._written |= cases
        if self._immediate:
            with module.evaluation_view():
                for measurement in self.measurements:
                    if isinstance(measurement, EditingMeasurement):
                        measurement.update(self._immediate[measurement.name], module.language_model, cases)
        if due := self._due(before, module.num_edits, trainer.is_last_batch):
            self._record(
                trainer, module.num_edits, self.evaluate(module, self._written, "evaluate", due, self._evaluations)
            )

    def _due(self, before: int, now: int, last: bool) -> list[Measurement]:
        """Return the measurements to take once ``now`` edits are done, ``before`` of them before the latest step."""

        def reached(counts: Sequence[int]) -> bool:
            return last or any(before < count <= now for count in counts)

        return [m for m in self.measurements if reached(self.counts if m.counts is None else m.counts)]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the final model if the stream was ended early."""
        module = _editing_module(pl_module)
        if self._written and not self._immediate and self.curve[-1]["num_edits"] != module.num_edits:
            scores = self.evaluate(module, self._written, "evaluate", self.measurements, self._evaluations)
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
