"""Checks every step of an edit stream for harmful edits and acts according to a policy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from prune_lightning.atomic_files import append_lines
from prune_lightning.distributed import on_rank_zero
from prune_lightning.errors import UserError, kind_of, one_of
from prune_lightning.json_files import nan_to_null
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.run_parts import StepBackup
from prune_lightning.types import EditBatch, EditRequest, EditStep

from ._editing import editing_module, last_report
from ._lightning import LightningCallback
from ._order import Place, check_order
from ._timing import part_of_phase
from .sentinel import PerplexityReading, Sentinel
from .update_guards import POLICIES, Finding, UpdateGuard

FINITE, PERPLEXITY, COLLAPSE = "finite", "perplexity", "collapse"


class Guards(LightningCallback):
    """Check each update before it is written, and the model's perplexity afterwards.

    ``warn`` writes the edit and logs a warning. ``skip`` does not write it. ``rollback`` does not write it either; an
    edit that the perplexity check refuses after it was written is undone bit for bit: weights, change, withheld part
    and the method's memory. To allow that, everything that an edit changes is copied before each step. ``stop`` ends
    the run early but writes all results; an edit refused before it was written is not applied. A non-finite update is
    never written, so for it only ``stop`` makes a difference.

    List it after the restraint and before callbacks that evaluate the edited model.

    Args:
        policy: Policy of all guards that have none of their own.
        path: JSONL file of the requests that were refused, one line each, written at once; relative to the Trainer's
            ``default_root_dir``. ``None`` for no file.
        finite: ``skip`` or ``stop`` at a non-finite update; ``None`` for ``stop`` if ``policy`` is ``stop``, else
            ``skip``.
        perplexity: The sentinel sentences; ``None`` for none.
        collapse: ``warn`` or ``stop`` when perplexity stays above its factor.
        guards: Guards that check updates, by name; ``None`` disables one.

    Attributes:
        found: Number of steps in which each guard found a problem.
        refused: Number of requests that were refused.
        readings: The perplexity readings, in order.
        findings: Each finding: the ``guard``, its ``reason``, and the first and the last of the step's ``edits``.
        stopped: Reason for ending the run early, or ``None``.

    Raises:
        UserError: An unknown policy.
    """

    place: ClassVar[Place] = Place.GUARD

    def __init__(
        self,
        policy: str = "warn",
        path: str | Path | None = None,
        finite: str | None = None,
        perplexity: Sentinel | None = None,
        collapse: str = "warn",
        **guards: UpdateGuard | None,
    ) -> None:
        one_of("guards.policy", policy, POLICIES)
        one_of("guards.collapse", collapse, ("warn", "stop"))
        if finite is not None:
            one_of("guards.finite", finite, ("skip", "stop"))
        for name, guard in guards.items():
            if guard is not None and not isinstance(guard, UpdateGuard):
                raise UserError(f"guards.{name} is expected to be a guard, e.g. NormGuard(), but got {kind_of(guard)}")
        if perplexity is not None and not isinstance(perplexity, Sentinel):
            raise UserError(f"guards.perplexity is expected to be a Sentinel, but got {kind_of(perplexity)}")
        self.policy, self.collapse, self.sentinel = policy, collapse, perplexity
        self.finite = finite or ("stop" if policy == "stop" else "skip")
        self.path = None if path is None else Path(path)
        self.guards = {name: guard for name, guard in guards.items() if guard is not None}
        # An edit that is already written cannot be skipped.
        self._after = "warn" if policy == "skip" else policy
        if perplexity and perplexity.policy:
            self._after = perplexity.policy
        self.found: Counter[str] = Counter()
        self.refused = 0
        self.readings: list[PerplexityReading] = []
        self.findings: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self._file: Path | None = None
        self._refusal: tuple[str, str, Finding] | None = None
        self._before: StepBackup | None = None
        self._step: dict[str, Any] = {}

    # -- along the stream -----------------------------------------------------------------------------------------
    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the guards as a veto on writing."""
        check_order(trainer)
        editing_module(self, pl_module).run.register_veto(self._veto)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the veto."""
        editing_module(self, pl_module).run.remove_veto(self._veto)

    @override
    @part_of_phase("guards")
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the file and read the unedited model's perplexity. A resumed run restores its edits later."""
        module = editing_module(self, pl_module)
        self._file = Path(trainer.default_root_dir, self.path) if self.path and trainer.is_global_zero else None
        if self._file and not getattr(trainer.datamodule, "done", ()):  # type: ignore[attr-defined]
            self._file.unlink(missing_ok=True)
        if self.sentinel:
            self.sentinel.begin(module.language_model)

    @override
    @part_of_phase("guards")
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Copy what the step will change, if it may have to be undone."""
        self._step, self._refusal = {}, None
        if self.sentinel and self._after == "rollback":
            self._before = editing_module(self, pl_module).run.backup()

    def _veto(self, step: EditStep) -> str | None:
        for name, guard in self.guards.items():
            finding = on_rank_zero(partial(guard.look, step.updates, step.details))
            if finding is not None:
                policy = guard.policy or self.policy
                self._note(name, finding.reason, step.requests)
                if policy != "warn" and self._refusal is None:
                    self._refusal = name, policy, finding
        return f"{self._refusal[0]}: {self._refusal[2].reason}" if self._refusal else None

    @override
    @part_of_phase("guards")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Read the model's perplexity, undo the step if necessary, and record refused requests."""
        module = editing_module(self, pl_module)
        report = last_report(module)
        if not report.applied and self._refusal is None:
            self._refusal = FINITE, self.finite, Finding(str(report.refused))
            self._note(FINITE, str(report.refused), batch.requests)
        elif report.applied and self.sentinel and self._due(trainer, module, batch):
            self._read(self.sentinel, trainer, module, batch)
            report = last_report(module)
        if report.applied:
            self._step["norm"] = report.update_norm
            self._written(report.update_norm)
        if self._refusal is not None:
            name, policy, finding = self._refusal
            if not report.applied:
                self._quarantine(module, batch, name, policy, finding)
            if policy == "stop":
                self._stop(trainer, module, f"{name}: {finding.reason}")
        if "found" in self._step:
            self._step["edits"] = [module.run.num_requests - len(batch.requests) + 1, module.run.num_requests]
            self._keep_findings(self._step)

    def _keep_findings(self, step: Mapping[str, Any]) -> None:
        for guard, reason in zip(step.get("found", []), step.get("reasons", []), strict=False):
            self.findings.append({"guard": guard, "reason": reason, "edits": step["edits"]})

    def _due(self, trainer: L.Trainer, module: EditingModule, batch: EditBatch) -> bool:
        assert self.sentinel is not None
        n = self.sentinel.every_n
        reached = module.run.num_requests // n != (module.run.num_requests - len(batch.requests)) // n
        return reached or trainer.is_last_batch or self._after == "rollback"

    def _read(self, sentinel: Sentinel, trainer: L.Trainer, module: EditingModule, batch: EditBatch) -> None:
        with module.run.evaluation_view():
            model = module.language_model
            read = partial(sentinel.read, model, module.run.num_requests)
            reading = on_rank_zero(read, everywhere=model.is_sharded)
        if wrong := sentinel.wrong(reading.relative):
            finding = Finding(
                f"perplexity is {reading.relative:.3g} times the unedited model's",
                {"perplexity": reading.perplexity, "relative": reading.relative},
            )
            self._note(PERPLEXITY, finding.reason, batch.requests)
            if self._after == "rollback":
                assert self._before is not None
                module.run.roll_back(self._before, f"{PERPLEXITY}: {finding.reason}")
            if self._after != "warn":
                self._refusal = PERPLEXITY, self._after, finding
        reading = replace(reading, kept=not (wrong and self._after == "rollback"))
        self.readings.append(reading)
        self._step["perplexity"] = asdict(reading)
        if reading.kept and sentinel.count(reading.relative):
            times = f"{sentinel.factor:g} times the unedited model's"
            reason = f"perplexity has been above {times} {sentinel.above} times in a row"
            if sentinel.above == sentinel.readings:
                self._note(COLLAPSE, reason, batch.requests)
            if self.collapse == "stop":
                self._stop(trainer, module, f"{COLLAPSE}: {reason}")

    def _written(self, norm: float) -> None:
        for guard in self.guards.values():
            guard.written(norm)

    def _note(self, name: str, reason: str, requests: Sequence[EditRequest]) -> None:
        self.found[name] += 1
        self._step.setdefault("found", []).append(name)
        self._step.setdefault("reasons", []).append(reason)
        if self.found[name] == 1:
            cases = ", ".join(str(request.case_id) for request in requests)
            rank_zero_warn(f"case {cases}: {reason} ({name}); further ones are counted in the summary")

    def _stop(self, trainer: L.Trainer, module: EditingModule, reason: str) -> None:
        if self.stopped is None:
            self.stopped = reason
            rank_zero_warn(f"the run ends after {module.run.num_requests} edits: {reason}")
        trainer.should_stop = True

    def _quarantine(self, module: EditingModule, batch: EditBatch, name: str, policy: str, finding: Finding) -> None:
        first = module.run.num_requests - len(batch.requests) + 1
        lines = [
            nan_to_null(
                {
                    "num_requests": place,
                    "request": request.as_dict(),
                    "guard": name,
                    "policy": policy,
                    "reason": finding.reason,
                    "figures": dict(finding.figures),
                }
            )
            for place, request in enumerate(batch.requests, start=first)
        ]
        self._step["refused"] = lines
        self._write(lines)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.refused += len(lines)
        if self._file and lines:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self._file, lines)

    # -- summary and state ----------------------------------------------------------------------------------------
    def summary(self) -> dict[str, Any]:
        """Return what the guards have found."""
        guards = {
            "policy": self.policy,
            "found": dict(self.found),
            "findings": self.findings,
            "refused": self.refused,
            "perplexity": [asdict(reading) for reading in self.readings],
            "stopped": self.stopped,
        }
        return {"guards": guards}

    def step_state(self) -> dict[str, Any]:
        """Return what was found in the latest step."""
        step, self._step = self._step, {}
        return nan_to_null(step)

    def load_step_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the findings of earlier steps and rewrite the file with the requests they refused."""
        if self._file:
            self._file.unlink(missing_ok=True)
        for state in states:
            self.found.update(state.get("found", []))
            self._keep_findings(state)
            self._write(state.get("refused", []))
            if "norm" in state:
                self._written(state["norm"])
            if "perplexity" in state:
                plain: dict[str, Any] = {
                    key: math.nan if value is None else value for key, value in state["perplexity"].items()
                }
                reading = PerplexityReading(**plain)
                self.readings.append(reading)
                if self.sentinel and reading.kept:
                    self.sentinel.count(reading.relative)
