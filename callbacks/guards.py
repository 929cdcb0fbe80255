"""Watches every step of an edit stream for edits that do harm, and acts by policy."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from prune_lightning.distributed import broadcast
from prune_lightning.errors import UserError, one_of
from prune_lightning.json_files import nan_to_null
from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch, EditRequest, MatrixUpdate

from ._measuring import part_of_phase
from .restraint import Restraint
from .sentinel import PerplexityReading, Sentinel
from .update_guards import POLICIES, Finding, UpdateGuard

FINITE, PERPLEXITY, COLLAPSE = "finite", "perplexity", "collapse"


class Guards(L.Callback):
    """Looks at each update before it is written, and at the model's perplexity afterwards.

    ``warn`` writes the edit and says so. ``skip`` does not write it. ``rollback`` does not either, and an edit that
    perplexity finds, after it was written and restrained, is taken back, bit for bit: weights, change, what is
    withheld, what the method remembers. For that everything an edit changes is copied before each step. ``stop`` ends
    the run early, everything written as at its end; an edit found before it was written stays out.
    An update that is not finite is never written, so for it only ``stop`` makes a difference.

    List it after the restraint and before whatever looks at the edited model.

    Args:
        policy: For all guards that have none of their own.
        path: JSONL file of the requests that were refused, one line each, written at once; ``None`` for no file.
        finite: ``skip`` or ``stop`` at an update that is not finite; ``None`` for ``stop`` where that is set for all.
        perplexity: The sentinel sentences; ``None`` for none.
        collapse: ``warn`` or ``stop`` when perplexity stays above its factor.
        guards: By name, what looks at updates; ``None`` leaves one out.

    Attributes:
        found: In how many steps each guard found something.
        refused: Number of requests that were refused.
        looks: What perplexity was at each look.
        stopped: Why the run was ended early, if it was.

    Raises:
        UserError: An unknown policy.
    """

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
        self.policy, self.collapse, self.sentinel = policy, collapse, perplexity
        self.finite = finite or ("stop" if policy == "stop" else "skip")
        self.path = None if path is None else Path(path)
        self.guards = {name: guard for name, guard in guards.items() if guard is not None}
        # An edit that is written cannot be skipped any more.
        self._after = "warn" if policy == "skip" else policy
        if perplexity and perplexity.policy:
            self._after = perplexity.policy
        self.found: Counter[str] = Counter()
        self.refused = 0
        self.looks: list[PerplexityReading] = []
        self.stopped: str | None = None
        self._writes = False
        self._refusal: tuple[str, str, Finding] | None = None
        self._before: dict[str, Any] | None = None
        self._pending: dict[Restraint, bool] = {}
        self._step: dict[str, Any] = {}

    # -- along the stream -----------------------------------------------------------------------------------------
    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the module ask before it writes."""
        if not isinstance(pl_module, EditingModule):
            raise UserError(f"Guards watch editing modules, but got {type(pl_module).__name__}")
        pl_module.vetoes.append(self._veto)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the module write again."""
        assert isinstance(pl_module, EditingModule)
        pl_module.vetoes.remove(self._veto)

    @override
    @part_of_phase("guards")
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file and look at the unedited model; earlier edits of a resumed run are put back later."""
        assert isinstance(pl_module, EditingModule)
        self._writes = trainer.is_global_zero
        if self.path and self._writes and pl_module.go_on is None:
            self.path.unlink(missing_ok=True)
        if self.sentinel:
            self.sentinel.begin(pl_module.language_model)

    @override
    @part_of_phase("guards")
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Copy what the step will change, if it may have to be taken back."""
        assert isinstance(pl_module, EditingModule)
        self._step, self._refusal = {}, None
        if self.sentinel and self._after == "rollback":
            self._before = copy.deepcopy(pl_module.edits())
            restraints = [c for c in trainer.callbacks if isinstance(c, Restraint)]  # type: ignore[attr-defined]
            self._pending = {restraint: restraint.pending for restraint in restraints}

    def _veto(
        self,
        requests: Sequence[EditRequest],
        updates: Mapping[str, MatrixUpdate],
        details: Sequence[Mapping[str, Any]],
    ) -> str | None:
        for name, guard in self.guards.items():
            finding = broadcast(guard.look(updates, details))
            if finding is not None:
                policy = guard.policy or self.policy
                self._note(name, finding.reason, requests)
                if policy != "warn" and self._refusal is None:
                    self._refusal = name, policy, finding
        return f"{self._refusal[0]}: {self._refusal[2].reason}" if self._refusal else None

    @override
    @part_of_phase("guards")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """PerplexityReading at the model, take the step back if need be, and write down what was refused."""
        assert isinstance(pl_module, EditingModule)
        report = pl_module.last_report
        assert report is not None
        if not report.applied and self._refusal is None:
            self._refusal = FINITE, self.finite, Finding(str(report.refused))
            self._note(FINITE, str(report.refused), batch.requests)
        elif report.applied and self.sentinel and self._due(trainer, pl_module, batch):
            self._look(self.sentinel, trainer, pl_module, batch)
            report = pl_module.last_report
            assert report is not None
        if report.applied:
            self._step["norm"] = report.update_norm
            self._written(report.update_norm)
        if self._refusal is not None:
            name, policy, finding = self._refusal
            if not report.applied:
                self._quarantine(pl_module, batch, name, policy, finding)
            if policy == "stop":
                self._stop(trainer, pl_module, f"{name}: {finding.reason}")

    def _due(self, trainer: L.Trainer, module: EditingModule, batch: EditBatch) -> bool:
        assert self.sentinel is not None
        n = self.sentinel.every_n
        reached = module.num_edits // n != (module.num_edits - len(batch.requests)) // n
        return reached or trainer.is_last_batch or self._after == "rollback"

    def _look(self, sentinel: Sentinel, trainer: L.Trainer, module: EditingModule, batch: EditBatch) -> None:
        with module.evaluation_view():
            look = broadcast(sentinel.look(module.language_model, module.num_edits))
        if wrong := sentinel.wrong(look.relative):
            finding = Finding(
                f"perplexity is {look.relative:.3g} times the unedited model's",
                {"perplexity": look.perplexity, "relative": look.relative},
            )
            self._note(PERPLEXITY, finding.reason, batch.requests)
            if self._after == "rollback":
                assert self._before is not None
                module.take_back(self._before, f"{PERPLEXITY}: {finding.reason}")
                for restraint, pending in self._pending.items():
                    restraint.pending = pending
            if self._after != "warn":
                self._refusal = PERPLEXITY, self._after, finding
        look = replace(look, stays=not (wrong and self._after == "rollback"))
        self.looks.append(look)
        self._step["look"] = asdict(look)
        if look.stays and sentinel.count(look.relative):
            times = f"{sentinel.factor:g} times the unedited model's"
            reason = f"perplexity has been above {times} at {sentinel.above} looks in a row"
            if sentinel.above == sentinel.looks:
                self._note(COLLAPSE, reason, batch.requests)
            if self.collapse == "stop":
                self._stop(trainer, module, f"{COLLAPSE}: {reason}")

    def _written(self, norm: float) -> None:
        for guard in self.guards.values():
            guard.written(norm)

    def _note(self, name: str, reason: str, requests: Sequence[EditRequest]) -> None:
        self.found[name] += 1
        self._step.setdefault("found", []).append(name)
        if self.found[name] == 1:
            cases = ", ".join(str(request.case_id) for request in requests)
            rank_zero_warn(f"case {cases}: {reason} ({name}); further ones are counted in the summary")

    def _stop(self, trainer: L.Trainer, module: EditingModule, reason: str) -> None:
        if self.stopped is None:
            self.stopped = reason
            rank_zero_warn(f"the run ends after {module.num_edits} edits: {reason}")
        trainer.should_stop = True

    def _quarantine(self, module: EditingModule, batch: EditBatch, name: str, policy: str, finding: Finding) -> None:
        first = module.num_edits - len(batch.requests) + 1
        lines = [
            nan_to_null(
                {
                    "num_edits": place,
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
        if self.path and self._writes and lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    # -- what is told ---------------------------------------------------------------------------------------------
    def summary(self) -> dict[str, Any]:
        """Return what there is to say at the end of a run."""
        return {
            "policy": self.policy,
            "found": dict(self.found),
            "refused": self.refused,
            "perplexity": [asdict(look) for look in self.looks],
            "stopped": self.stopped,
        }

    def step(self) -> dict[str, Any]:
        """Return what was found in the latest step."""
        return nan_to_null(self._step)

    def take_up(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Go on from earlier steps, and write the lines of what they refused again."""
        if self.path and self._writes:
            self.path.unlink(missing_ok=True)
        for step in steps:
            self.found.update(step.get("found", []))
            self._write(step.get("refused", []))
            if "norm" in step:
                self._written(step["norm"])
            if "look" in step:
                told = step["look"]
                perplexity, relative = (
                    math.nan if told[key] is None else told[key] for key in ("perplexity", "relative")
                )
                look = PerplexityReading(told["num_edits"], perplexity, relative, told["stays"])
                self.looks.append(look)
                if self.sentinel and look.stays:
                    self.sentinel.count(look.relative)
