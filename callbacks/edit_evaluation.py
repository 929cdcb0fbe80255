"""Evaluates an edited model before the first edit and at chosen edit counts, over all edits so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
from typing_extensions import override

from prune_lightning.errors import UserError
from prune_lightning.evaluation.abilities import AbilitySuite
from prune_lightning.evaluation.editing import update_editing_score
from prune_lightning.methods.base import EditingModule
from prune_lightning.metrics import EditingScore
from prune_lightning.metrics.functional import retention
from prune_lightning.spectral import condition_number, sigma_max
from prune_lightning.types import EditBatch, EditRequest

Scores = dict[str, float]


class EditEvaluation(L.Callback):
    """Editing scores, abilities and spectra along the stream.

    The baseline is taken on the unedited model over the requests of the whole stream; afterwards the scores are over
    all requests written so far. Under the protocols ``single`` and ``batch`` each step's requests are scored right
    after it, before the model is put back, and averaged.

    Args:
        counts: Edit counts at which to evaluate; the last edit is always evaluated.
        abilities: General abilities to measure; ``None`` for none.
        baseline: Scores of the unedited model, if they were taken before.

    Attributes:
        baseline: Scores of the unedited model.
        curve: Scores at each evaluated count, ``num_edits`` among them.
        seconds: Time spent here.
    """

    def __init__(
        self, counts: Sequence[int], abilities: AbilitySuite | None = None, baseline: Scores | None = None
    ) -> None:
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise UserError(f"evaluation.counts is expected to be edit counts, but got {list(counts)}")
        self.counts = sorted(set(counts) - {0})
        self.abilities = abilities
        self.baseline: Scores = baseline or {}
        self.curve: list[Scores] = []
        self.seconds = 0.0
        self._written: list[EditRequest] = []
        self._immediate: EditingScore | None = None
        self._rounds = 0

    # -- what one evaluation is -----------------------------------------------------------------------------------
    def _jobs(self, module: EditingModule, requests: Sequence[EditRequest]) -> dict[str, Callable[[], Scores]]:
        model = module.language_model
        jobs: dict[str, Callable[[], Scores]] = {}
        for name, job in (self.abilities.jobs(model) if self.abilities else {}).items():
            jobs[name] = partial(self._ability, name, job)
        jobs["editing"] = partial(self._editing, module, requests)
        jobs["spectrum"] = partial(self._spectrum, module)
        return jobs

    @staticmethod
    def _ability(name: str, job: Callable[[], float]) -> Scores:
        return {f"ability/{name}": job()}

    def _editing(self, module: EditingModule, requests: Sequence[EditRequest]) -> Scores:
        metric = self._immediate
        if metric is None:
            metric = EditingScore().to(module.device)
            update_editing_score(metric, module.language_model, requests)
        return {f"edit/{name}": float(value) for name, value in metric.compute().items()}

    @staticmethod
    def _spectrum(module: EditingModule) -> Scores:
        matrices = module.edited_matrices().values()
        return {
            "spectrum/sigma_max_delta": max(sigma_max(matrix.delta()) for matrix in matrices),
            "spectrum/condition_number": max(condition_number(matrix.weight()) for matrix in matrices),
        }

    def evaluate(self, module: EditingModule, requests: Sequence[EditRequest], phase: str, rounds: int = 1) -> Scores:
        """Run one evaluation.

        Args:
            module: The editing module.
            requests: Requests to score.
            phase: Name under which progress is shown.
            rounds: Evaluations of this phase that the whole run makes.
        """
        start = time.perf_counter()
        jobs = self._jobs(module, requests)
        scores: Scores = {}
        with module.evaluation_view():
            for name in module.track(list(jobs), phase, len(jobs) * rounds):
                scores |= jobs[name]()
        if self.abilities:
            before = self.baseline or scores
            keys = [f"ability/{task}" for task in self.abilities.tasks]
            scores["ability/retention"] = retention(scores, {key: before[key] for key in keys})
        self.seconds += time.perf_counter() - start
        return scores

    # -- when it happens ------------------------------------------------------------------------------------------
    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the baseline."""
        module = _editing_module(pl_module)
        batches = _stream(trainer).batches()
        requests = [request for batch in batches for request in batch.requests]
        total = len(requests)
        self._rounds = len({count for count in self.counts if count < total} | {total})
        if not self.baseline:
            self.baseline = self.evaluate(module, requests, "baseline")
        self._record(trainer, 0, self.baseline)
        if batches[0].from_base:
            self._immediate = EditingScore().to(module.device)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Evaluate if this batch reached one of the counts, or is the last one."""
        module = _editing_module(pl_module)
        self._written += batch.requests
        if self._immediate is not None:
            with module.evaluation_view():
                update_editing_score(self._immediate, module.language_model, batch.requests)
        before = module.num_edits - len(batch.requests)
        if trainer.is_last_batch or any(before < count <= module.num_edits for count in self.counts):
            self._record(trainer, module.num_edits, self.evaluate(module, self._written, "evaluate", self._rounds))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the final model if the stream was ended early."""
        module = _editing_module(pl_module)
        if self._written and self._immediate is None and self.curve[-1]["num_edits"] != module.num_edits:
            self._record(trainer, module.num_edits, self.evaluate(module, self._written, "evaluate", self._rounds))

    def _record(self, trainer: L.Trainer, num_edits: int, scores: Scores) -> None:
        self.curve.append({"num_edits": num_edits, **scores})
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=num_edits)


def _editing_module(module: L.LightningModule) -> EditingModule:
    if not isinstance(module, EditingModule):
        raise UserError(f"EditEvaluation evaluates editing modules, but got {type(module).__name__}")
    return module


def _stream(trainer: L.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
