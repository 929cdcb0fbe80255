"""Evaluates an edited model before the first edit and at chosen edit counts, over the edits so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from typing_extensions import override

from prune_lightning.data.stream import EditStream
from prune_lightning.distributed import fail_together
from prune_lightning.errors import UserError
from prune_lightning.evaluation.case_rows import CaseRows
from prune_lightning.evaluation.case_sampler import CaseSampler
from prune_lightning.evaluation.evaluator import Evaluator, Scores
from prune_lightning.evaluation.measurement import Measurement, Stream
from prune_lightning.evaluation.spectrum import SPECTRUM, spectrum
from prune_lightning.evaluation.stream import FORMS, StreamScores
from prune_lightning.methods.base import EditingModule
from prune_lightning.phases import PhaseClock
from prune_lightning.ranges import Count, NonNegative, Whole
from prune_lightning.report.trajectories import ability_trajectories, edit_trajectories
from prune_lightning.types import EditBatch, EditRequest
from prune_lightning.value_types import check_value

from ._editing import editing_module
from ._lightning import LightningCallback
from ._order import Place, check_order


class EditEvaluation(LightningCallback):
    """Decides when an edited model is evaluated, and over which cases; an :class:`~.evaluator.Evaluator` does it.

    The baseline is measured on the unedited model over all cases that will be evaluated. Later scores are over the
    requests handled so far, or over a sample stratified by age, in which each case is weighted by the number of cases
    it represents. The last evaluation is of the final model, after every restraint. Under the protocols ``single`` and
    ``batch`` each step's requests are scored right after the step, before the unedited model is restored, and averaged.
    Every process measures everything; only rank 0 writes files.

    Args:
        counts: Edit counts at which to evaluate; the final model is always evaluated.
        measurements: What to measure; those not enabled are left out.
        stream: Metrics over the whole stream, shared with the edit log; ``None`` for none.
        max_cases: Largest number of requests per evaluation; see :class:`~.case_sampler.CaseSampler`.
        seed: Seed of the sample.
        cases_file: JSONL file for per-case rows.
        max_case_mb: See :class:`~.case_rows.CaseRows`.
        earlier: An evaluation of the same stream with the same measurements; its baseline is reused.
        clock: Measures the time; a new clock by default.

    Attributes:
        evaluator: What has been measured.
    """

    place: ClassVar[Place] = Place.EVALUATION

    def __init__(
        self,
        counts: Sequence[Whole],
        measurements: Sequence[Measurement] = (),
        stream: StreamScores | None = None,
        max_cases: Count | None = None,
        seed: int = 0,
        cases_file: Path | None = None,
        max_case_mb: NonNegative | None = None,
        earlier: EditEvaluation | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        check_value("evaluation.counts", counts, Sequence[Whole])
        self.counts = sorted(set(counts) - {0})
        self.max_cases, self.seed = max_cases, seed
        self.cases_file, self.max_case_mb = cases_file, max_case_mb
        self.evaluator = Evaluator(measurements, stream, clock=clock)
        if earlier:
            self.evaluator.share_baseline(earlier.evaluator)
        self._requests: list[EditRequest] = []
        self._probed: dict[int, float] = {}
        self._from_base = False
        self._evaluations = 0
        self._reported = 1  # entries of the curve; the baseline is taken again in a resumed run

    @property
    def measurements(self) -> list[Measurement]:
        """What is measured."""
        return self.evaluator.measurements

    @property
    def curve(self) -> list[Scores]:
        """Scores at each evaluated count, ``num_requests`` among them."""
        return self.evaluator.curve

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the order of callbacks."""
        editing_module(self, pl_module)
        check_order(trainer)

    # -- the unedited model ---------------------------------------------------------------------------------------
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the cases to evaluate and measure the baseline."""
        module, stream = editing_module(self, pl_module), _stream(trainer)
        self._requests, self._from_base = stream.requests, stream.protocol.from_base
        ends = list(accumulate(len(batch.requests) for batch in stream.batches()))
        self._plan(ends, stream)
        if self.cases_file and trainer.is_global_zero:
            self.evaluator.rows = CaseRows(self.cases_file, self.max_case_mb, keep=sum(stream.done))
        cases = {i: self._requests[i] for i in self._probed}
        model = module.language_model
        with model.kept.while_unchanged(), self.evaluator.clock.phase("baseline"):
            if self.evaluator.baseline:
                self.curve.append({"num_requests": 0, **self.evaluator.baseline})
            else:
                edited = Stream(self._requests, module.edited_matrices(), stream.placed_groups())
                self.evaluator.take_baseline(model, cases, partial(spectrum, module.edited_matrices().values()), edited)
                self._remark(trainer)
            self._log(trainer)
            self.evaluator.begin_stream(model, cases, self.sampler.commits, self.max_cases)
        if self._from_base:
            self.evaluator.begin_immediate(module.device)

    def _plan(self, ends: Sequence[int], stream: EditStream) -> None:
        """Determine at which edit counts, and on which cases, the model will be evaluated."""
        commits = [end for start, end in pairwise([0, *ends]) for _ in range(end - start)]
        most = None if self._from_base else self.max_cases
        self.sampler = CaseSampler(commits, most, self.seed, stream.superseded())
        planned = [end for start, end in pairwise([0, *ends]) if end == ends[-1] or self._due(start, end) is not None]
        self._evaluations = sum(end > sum(stream.done) for end in planned)
        probed = {i for end in planned for i in self.sampler.chosen(end)} | set(range(ends[0]))
        self._probed = dict.fromkeys(sorted(probed), 1.0)

    # -- along the stream -----------------------------------------------------------------------------------------
    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Evaluate if this batch reached one of the counts. The final model is evaluated in :meth:`on_train_end`."""
        module = editing_module(self, pl_module)
        now = module.num_requests
        before = now - len(batch.requests)
        if self._from_base:
            with module.run.evaluation_view():
                self.evaluator.score_immediately(module.language_model, dict(enumerate(batch.requests, start=before)))
        due = self._due(before, now)
        if trainer.is_last_batch:
            due = self.measurements if self._from_base else None
        if due is not None:
            self._evaluate(trainer, module, self.sampler.chosen(now), due)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the final model. If the stream ended early, only cases with a baseline are used."""
        module = editing_module(self, pl_module)
        now = module.num_requests
        if not now or self._from_base:
            return
        module.run.finish()
        if self.curve[-1]["num_requests"] == now:
            self._drop_last()  # of a stream that was ended at an evaluated count: the model may be another now
        among = None if now == len(self._requests) else self._probed
        self._evaluate(trainer, module, self.sampler.chosen(now, among), self.measurements)

    def _drop_last(self) -> None:
        self.evaluator.drop_last()
        self._reported = min(self._reported, len(self.curve))

    def _evaluate(
        self, trainer: L.Trainer, module: EditingModule, weights: Mapping[int, float], due: Sequence[Measurement]
    ) -> None:
        cases = {i: self._requests[i] for i in weights}
        with fail_together(), module.run.evaluation_view():  # rows are written by the first process alone
            self.evaluator.evaluate(
                module.language_model,
                cases,
                weights,
                module.num_requests,
                due,
                partial(spectrum, module.edited_matrices().values()),
                max(1, self._evaluations),
            )
        self._evaluations -= 1
        self._log(trainer)

    def _due(self, before: int, now: int) -> list[Measurement] | None:
        """Return the measurements due once ``now`` requests are handled, ``before`` of them before the latest step.

        ``None`` if there is no evaluation; the metrics over the stream are part of each.
        """

        def reached(counts: Sequence[int]) -> bool:
            return any(before < count <= now for count in counts)

        due = [m for m in self.measurements if reached(self.counts if m.counts is None else m.counts)]
        return due if due or reached(self.counts) else None

    def _remark(self, trainer: L.Trainer) -> None:
        for remark in self.remarks() if trainer.is_global_zero else ():
            logging.getLogger(__name__).warning(remark)

    def _log(self, trainer: L.Trainer) -> None:
        entry = dict(self.curve[-1])
        num_requests = int(entry.pop("num_requests"))
        for logger in trainer.loggers:
            logger.log_metrics(entry, step=num_requests)

    # -- state ----------------------------------------------------------------------------------------------------
    def step_state(self) -> dict[str, Any]:
        """Return the scores measured since the last call."""
        stream = self.evaluator.stream
        measured = {"scores": self.curve[self._reported :], "intervals": self.evaluator.intervals[self._reported :]}
        self._reported = len(self.curve)
        fresh = {"stream": stream.fresh()} if stream else {}
        return fresh | (measured if measured["scores"] else {})

    def load_step_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore what was measured in earlier steps."""
        if self._from_base:
            raise UserError("a run whose steps each start from the unedited model cannot be resumed: run it again")
        for state in states:
            self.evaluator.restore(state)
        self._reported = len(self.curve)

    def load_end_state(self, state: Mapping[str, Any], before: int) -> None:
        """Restore the evaluation of the final model of a shorter stream, if it is due in this one."""
        scores = state.get("scores", [])
        now = scores[-1]["num_requests"] if scores else 0
        if now > self.curve[-1]["num_requests"] and self._due(before, now) is not None:
            self.evaluator.restore(state, again=True)
        self.evaluator.retain_rows()  # not those of another final evaluation, which is repeated

    # -- summary --------------------------------------------------------------------------------------------------
    def remarks(self) -> list[str]:
        """Return sentences on what the scores leave out."""
        return self.evaluator.retention.remarks() + [line for m in self.measurements for line in m.remarks()]

    def summary(self) -> dict[str, Any]:
        """Return all scores, their confidence intervals, and the time that evaluation took."""
        evaluator = self.evaluator
        final = {key: value for key, value in self.curve[-1].items() if key != "num_requests"}
        return {
            "baseline": evaluator.baseline,
            "final": final,
            "curve": self.curve,
            "intervals": evaluator.intervals,
            "num_cases": evaluator.num_cases,
            "stream": _trajectories(evaluator),
            "retention": evaluator.retention.facts(),
            "measurements": {m.name: dict(facts) for m in evaluator.measurements if (facts := m.facts())},
            "case_rows_left_out": evaluator.rows.left_out,
            "labels": {**evaluator.labels(), "spectrum": SPECTRUM},
            "evaluate_s": sum(evaluator.seconds.values()),
            "evaluate_s_by": dict(evaluator.seconds),
        }


def _trajectories(evaluator: Evaluator) -> dict[str, Any]:
    """Return figures of the stream as a whole, such as half-lives, beyond the scores of each evaluation."""
    abilities: dict[str, float] = {}
    for name, tasks in evaluator.retention.tasks.items():
        abilities |= {f"{name}/retention": 0.0} | {f"{name}/{task}": chance for task, chance in tasks.items()}
    return {
        "forms": evaluator.stream.details() if evaluator.stream else {},
        "abilities": ability_trajectories(evaluator.curve, abilities),
        "edits": edit_trajectories(evaluator.curve, [f"stream/{form}/final" for form in FORMS]),
    }


def _stream(trainer: L.Trainer) -> EditStream:
    return trainer.datamodule  # type: ignore[attr-defined]
