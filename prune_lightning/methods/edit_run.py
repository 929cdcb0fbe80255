"""The state of an edit stream on one module: its edited parts, its position, and what is pending."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.devices import to_device
from prune_lightning.distributed import true_on_all_ranks
from prune_lightning.errors import UserError, one_of
from prune_lightning.methods.edited_part import EditedPart, Event
from prune_lightning.methods.run_parts import AttachedRestraint, MethodMemory, StepBackup, StepFilter
from prune_lightning.spectral import NonFiniteChange
from prune_lightning.types import EditReport, EditRequest, EditStep, norm_of_all

Veto: TypeAlias = Callable[[EditStep], str | None]
"""Checks a step before it is written; returns the reason to refuse it, or ``None``."""


class Phase(StrEnum):
    """The phase of a run: ``new`` on the unedited model, ``editing``, or ``finished``."""

    NEW = "new"
    EDITING = "editing"
    FINISHED = "finished"


class EditRun:
    """Owns what the edits change, the position in the stream, and what is pending.

    A step consists of ``begin_step``, ``apply`` and, after all callbacks, ``settle``. ``finish`` ends the stream. Each
    change of a part is recorded as an event until :meth:`take_events` collects it for the ledger.

    Args:
        parts: Returns what the edits change, by its name: matrices, or a memory. Called once, on the first access to
            :attr:`parts`; the model has to be on its device by then.
        memory: The method's memory of its edits.
        non_finite: What to do with an update that holds NaN or infinity: ``skip`` it with a warning, or ``raise``. It
            is never written.
        frozen: Context in which the method runs the model.

    Attributes:
        phase: See :class:`Phase`.
        num_requests: Requests handled so far, refused ones included.
        num_steps: Number of steps so far.
        last_report: Report of the latest step.

    Raises:
        UserError: An unknown policy.
    """

    def __init__(
        self,
        parts: Callable[[], Mapping[str, EditedPart]],
        memory: MethodMemory,
        non_finite: str,
        frozen: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        one_of("non_finite", non_finite, ("skip", "raise"))
        self.non_finite = non_finite
        self._find_parts, self._memory, self._frozen = parts, memory, frozen
        self._parts: dict[str, EditedPart] | None = None
        self._vetoes: list[Veto] = []
        self._start()

    def _start(self) -> None:
        self.phase = Phase.NEW
        self.num_requests, self.num_steps = 0, 0
        self.last_report: EditReport | None = None
        self._restraints: list[AttachedRestraint] = []
        self._unsettled: Sequence[EditRequest] | None = None
        self._observed: Mapping[str, Tensor] = {}

    @property
    def parts(self) -> Mapping[str, EditedPart]:
        """What the edits change, by its name."""
        if self._parts is None:
            self._parts = dict(self._find_parts())
        return self._parts

    def to(self, device: torch.device) -> EditRun:
        """Move the state of the edited parts to the model's new device, in place."""
        self._observed = to_device(self._observed, device)
        for part in (self._parts or {}).values():
            part.to(device)
        return self

    # -- restraints and vetoes -------------------------------------------------------------------------------------
    def register_restraint(self, restraint: AttachedRestraint) -> None:
        """Register a restraint for evaluation, for undoing steps, and for :meth:`finish`."""
        if restraint not in self._restraints:
            self._restraints.append(restraint)

    @property
    def step_filters(self) -> list[StepFilter]:
        """The restraints that act on the steps of a method's own optimizer."""
        return [restraint for restraint in self._restraints if isinstance(restraint, StepFilter)]

    def register_veto(self, veto: Veto) -> None:
        """Call ``veto`` on each finite update before it is written; the first refusal counts."""
        self._vetoes.append(veto)

    def remove_veto(self, veto: Veto) -> None:
        """Remove a veto."""
        self._vetoes.remove(veto)

    @property
    def pending(self) -> bool:
        """Whether a restraint has not processed all steps yet."""
        return any(restraint.pending for restraint in self._restraints)

    @contextmanager
    def evaluation_view(self) -> Iterator[None]:
        """Inside the block the model is as it would be if the run ended now; use it around every evaluation."""
        with ExitStack() as stack:
            for restraint in self._restraints:
                stack.enter_context(restraint.evaluation_view())
            yield

    # -- a step ---------------------------------------------------------------------------------------------------
    def begin_step(self) -> None:
        """Begin a step. Events of the previous step that were not taken are dropped."""
        self.phase = Phase.EDITING
        self._unsettled, self._observed = None, {}
        for part in self.parts.values():
            part.begin_step()

    def apply(self, step: EditStep, started: float) -> EditReport:
        """Validate a step, check the vetoes, and write all of it or nothing.

        Args:
            step: The updates that the method computed for the step's requests.
            started: ``time.perf_counter()`` at the start of that computation.

        Raises:
            ValueError: An update of something that is not under edit, of another shape, or details that do not fit the
                requests; nothing has been written.
            NonFiniteChange: NaN or infinity, under ``non_finite=raise``.
        """
        self._validate(step)
        finite = true_on_all_ranks(all(self.parts[n].can_hold(update) for n, update in step.updates.items()))
        refused = self._refusal(step) if finite else self._not_finite(step)
        if refused is None:
            for name, update in step.updates.items():
                self.parts[name].add(update)
            self._unsettled = step.requests
        self.num_requests += len(step.requests)
        self.num_steps += 1
        norm = norm_of_all(step.updates) if finite else float("nan")
        seconds = time.perf_counter() - started
        self.last_report = EditReport(step.requests, norm, seconds, tuple(step.details), refused is None, refused)
        return self.last_report

    def _validate(self, step: EditStep) -> None:
        if len(step.details) != len(step.requests):
            raise ValueError(f"expected details of {len(step.requests)} requests, but got {len(step.details)}")
        for name, update in step.updates.items():
            if name not in self.parts:
                raise ValueError(f"the method updates {name!r}, which is not among what it edits")
            self.parts[name].check(update)

    def _refusal(self, step: EditStep) -> str | None:
        return next((reason for veto in self._vetoes if (reason := veto(step))), None)

    def _not_finite(self, step: EditStep) -> str:
        cases = ", ".join(str(request.case_id) for request in step.requests)
        message = f"the update of case {cases} is not finite; the model is unchanged"
        if self.non_finite == "raise":
            raise NonFiniteChange(f"{message}. `non_finite=skip` continues with the next edit")
        rank_zero_warn(f"{message} and the edit was skipped")
        return "the update is not finite"

    def settle(self) -> Mapping[str, Tensor]:
        """Add the step to the method's memory, on the model after every restraint, and return what it observed.

        The second call of a step returns the same.
        """
        if self._unsettled is not None:
            requests, self._unsettled = self._unsettled, None
            with self._frozen():
                self._observed = {name: t.contiguous() for name, t in self._memory.observe(requests).items()}
                self._memory.remember(self._observed)
        return self._observed

    def backup(self) -> StepBackup:
        """Copy what the next step will change. The method's memory changes only in :meth:`settle`."""
        parts = {name: deepcopy(part.state_dict()) for name, part in self.parts.items()}
        return StepBackup(parts, [restraint.pending for restraint in self._restraints])

    def roll_back(self, before: StepBackup, reason: str) -> EditReport:
        """Undo the latest step and any restraint since. Its requests still count as handled, and as refused.

        Args:
            before: The value of :meth:`backup` before the step.
            reason: The reason, for the report.
        """
        assert self.last_report is not None
        assert self._unsettled is not None, "a step can be undone until it is settled"
        for name, part in self.parts.items():
            part.load_state_dict(before.parts[name])
        for restraint, pending in zip(self._restraints, before.pending, strict=True):
            restraint.restore_pending(pending)
        self._unsettled = None
        self.last_report = replace(self.last_report, applied=False, refused=reason)
        return self.last_report

    def take_events(self) -> dict[str, list[Event]]:
        """Return the events of each part since the last call, or since the step began."""
        events = {name: part.journal for name, part in self.parts.items()}
        for part in self.parts.values():
            part.journal = []
        return events

    # -- the ends -------------------------------------------------------------------------------------------------
    def finish(self) -> None:
        """End the stream: restraints process what is pending. A second call does nothing."""
        if self.phase is Phase.EDITING:
            for restraint in self._restraints:
                restraint.finish()
            self.phase = Phase.FINISHED

    def restore(self) -> None:
        """Restore the unedited model, bit for bit, and clear the method's memory."""
        for part in self.parts.values():
            part.restore()
        self._unsettled, self._observed = None, {}
        self._memory.forget()

    def restart(self) -> None:
        """Reset the run to before the first edit. Restraints have to attach again."""
        self.restore()
        self._start()

    # -- state ----------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return the state of all edits so far; tensors are not copied."""
        return {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "memory": dict(self._memory.memory()),
            "num_requests": self.num_requests,
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], memory: bool = True) -> None:
        """Load a :meth:`state_dict` and have the model show it.

        Args:
            state: See :meth:`state_dict`.
            memory: Restore the method's memory, too; only needed for further edits.

        Raises:
            UserError: The state is of other parts.
        """
        if state["parts"].keys() != self.parts.keys():
            expected, found = (", ".join(sorted(names)) for names in (self.parts, state["parts"]))
            raise UserError(f"expected the state of {expected}, but got that of {found}")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        if memory:
            device = next(iter(self.parts.values())).device
            self._memory.load_memory({name: tensor.to(device) for name, tensor in state["memory"].items()})
        self.move_to(state["num_requests"], state["num_steps"])

    def move_to(self, num_requests: int, num_steps: int) -> None:
        """Set the position in the stream after a replay restored edits."""
        self.num_requests, self.num_steps = num_requests, num_steps
        self.phase = Phase.EDITING if num_steps else Phase.NEW
