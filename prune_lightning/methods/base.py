"""The one editing loop: a batch of requests in, an update of some weight matrices out, applied and reported."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from prune_lightning.distributed import broadcast
from prune_lightning.errors import UserError
from prune_lightning.fingerprint import fingerprint
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.methods.no_op_optimizer import NoOpOptimizer
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock
from prune_lightning.spectral import NonFiniteChange
from prune_lightning.types import EditBatch, EditReport, EditRequest, MatrixUpdate, norm_of_all

COMPARE_EVERY = 100  # edits between two comparisons of the processes' weights

Veto: TypeAlias = Callable[[Sequence[EditRequest], Mapping[str, MatrixUpdate], Sequence[Mapping[str, Any]]], str | None]
"""Looks at requests, their update and their details before the update is written; returns why it shall not be."""


class EditingModule(L.LightningModule, ABC):
    """Base of all editing methods.

    A method implements :meth:`compute_update` and, if it needs statistics or the like, :meth:`prepare`.

    Args:
        language_model: The model to edit.
        layers: Indices of the blocks that are edited, ascending; their MLP down-projection unless the method says
            otherwise (:meth:`edited_modules`).

    Attributes:
        non_finite: What to do with an update that holds NaN or infinity; it is never written. ``skip`` it and say so,
            or ``raise``. Set from the configuration.
        facts: What a method found out while preparing, for the run's summary.
        num_edits: Requests handled since the unedited model.
        num_steps: Steps made since the unedited model.
        observed: What the latest step gave to remember.
        vetoes: Asked in turn about each finite update before it is written; the first refusal counts.
        go_on: Puts earlier edits back, once, when everything is prepared; set by whoever resumes a run.
        last_report: What the latest step did.
        phase_clock: Accounts for the time; set by whoever accounts for a whole run.
        evaluation_view: Entered around every evaluation; set by a restraint that restrains snapshots only.
    """

    def __init__(self, language_model: LanguageModel, layers: Sequence[int]) -> None:
        super().__init__()
        if not layers or list(layers) != sorted(set(layers)):
            raise UserError(f"`layers` is expected to be ascending layer indices, but got {list(layers)}")
        self.automatic_optimization = False
        self.language_model = language_model
        self.layers = tuple(layers)
        for layer in self.layers:
            language_model.rewrite_module(layer)
        self.non_finite = "skip"
        self.facts: dict[str, float] = {}
        self.num_edits, self.num_steps = 0, 0
        self.last_report: EditReport | None = None
        self.phase_clock = PhaseClock()
        self.evaluation_view: Callable[[], AbstractContextManager[None]] = nullcontext
        self._matrices: dict[str, EditedMatrix] | None = None
        self.observed: dict[str, Tensor] = {}
        self.vetoes: list[Veto] = []
        self.go_on: Callable[[], None] | None = None
        self.strict_loading = False  # a checkpoint holds what the edits did, not the model
        self._clock = nn.Parameter(torch.zeros(1))  # DDP wraps no module without a trainable parameter

    # -- what a method writes -------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Compute, on the unedited model, what all edits need; a restart of the stream does not need it again."""

    @abstractmethod
    def compute_update(
        self, requests: Sequence[EditRequest]
    ) -> tuple[Mapping[str, MatrixUpdate], list[dict[str, Any]]]:
        """Return the update of each edited weight, by name, and per request what there is to tell.

        An update is factored where the method knows factors, dense otherwise. The weights are bit-equal to what they
        were when this returns.
        """

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return, by name, what must be remembered of requests that have just been written, such as their keys."""
        return {}

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`observe` returned, now or in the run that is gone on with."""

    def memory(self) -> Mapping[str, Tensor]:
        """Return everything that has been remembered, for a checkpoint."""
        return {}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`memory` returned."""

    def forget(self) -> None:
        """Forget everything that has been remembered."""

    def upcoming(self, count: int) -> list[EditRequest]:
        """Return the next requests of the stream, ``count`` at most; none outside of a Trainer with an edit stream."""
        trainer = self._trainer
        requests = getattr(getattr(trainer, "datamodule", None), "requests", ())
        return list(requests[self.num_edits : self.num_edits + count])

    def write(self, requests: Sequence[EditRequest], updates: Mapping[str, MatrixUpdate]) -> None:
        """Write updates into the weights."""
        for name, update in updates.items():
            self.edited_matrices()[name].add(update)
        self.observed = dict(self.observe(requests))
        self.remember(self.observed)

    # -- the matrices ---------------------------------------------------------------------------------------------
    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return the modules whose weight is edited, by the weight's qualified name in the ``transformers`` model.

        The MLP down-projections of :attr:`layers`; a method that edits others names them here.
        """
        model = self.language_model
        return {model.rewrite_name(layer): model.rewrite_module(layer) for layer in self.layers}

    def edited_matrices(self) -> Mapping[str, EditedMatrix]:
        """Return the matrices under edit, by the name of their weight."""
        if self._matrices is None:
            self._matrices = {
                name: EditedMatrix(name, cast(nn.Parameter, module.weight), stores_transposed(module))
                for name, module in self.edited_modules().items()
            }
        return self._matrices

    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        for matrix in self.edited_matrices().values():
            matrix.restore()
        self.forget()

    def restart(self) -> None:
        """Go back to before the first edit; what was prepared is kept."""
        self.restore()
        self.num_edits, self.num_steps = 0, 0
        self.last_report = None
        self.evaluation_view = nullcontext

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """Let weights change inside the block and put back every bit afterwards."""
        parameters = [matrix.parameter for matrix in self.edited_matrices().values()]
        saved = [parameter.detach().clone() for parameter in parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, saved, strict=True):
                    parameter.copy_(value)

    # -- Lightning ------------------------------------------------------------------------------------------------
    def configure_optimizers(self) -> NoOpOptimizer:
        """Return the clock; editing methods keep their inner optimizers to themselves."""
        return NoOpOptimizer(self._clock)

    def transfer_batch_to_device(self, batch: EditBatch, device: torch.device, dataloader_idx: int) -> EditBatch:
        """Requests are text: nothing to move."""
        return batch

    def on_train_start(self) -> None:
        """Take hold of the original weights and prepare; the Trainer has moved the model by now."""
        self.edited_matrices()
        with self.phase_clock.phase("prepare"), self.language_model.frozen_mode():
            self.prepare()
        if self.go_on:
            with self.phase_clock.phase("replay"):
                self.go_on()
            self.go_on = None
        requests = getattr(self.trainer.datamodule, "requests", ())  # type: ignore[attr-defined]
        self.phase_clock.named("edit").expect(len(requests), done=self.num_edits)

    def on_fit_end(self) -> None:
        """Put earlier edits back where nothing was left to do, so that training never started."""
        if self.go_on:
            self.go_on()
            self.go_on = None

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Write one batch of requests into the weights."""
        start = time.perf_counter()
        self.observed = {}
        for matrix in self.edited_matrices().values():
            matrix.begin_step()
        with self.language_model.frozen_mode():
            updates, details = self.compute_update(batch.requests)
            finite = all(self.edited_matrices()[name].can_hold(update) for name, update in updates.items())
            refused = self._refused(batch.requests, updates, details) if finite else self._not_finite(batch.requests)
            if refused is None:
                self.write(batch.requests, updates)
        self.num_edits += len(batch.requests)
        self.num_steps += 1
        norm = norm_of_all(updates) if finite else float("nan")
        seconds = time.perf_counter() - start
        self.phase_clock.named("edit").advance(len(batch.requests))
        if refused is None:
            self._compare_processes(self.num_edits - len(batch.requests))
        self.last_report = EditReport(batch.requests, norm, seconds, tuple(details), refused is None, refused)
        self.log_dict({"edit/update_norm": norm, "edit/seconds": seconds}, batch_size=len(batch.requests), logger=False)
        clock = self.optimizers()
        assert isinstance(clock, (torch.optim.Optimizer, L.pytorch.core.optimizer.LightningOptimizer))
        clock.step()

    def _refused(
        self,
        requests: Sequence[EditRequest],
        updates: Mapping[str, MatrixUpdate],
        details: Sequence[Mapping[str, Any]],
    ) -> str | None:
        return next((reason for veto in self.vetoes if (reason := veto(requests, updates, details))), None)

    def _not_finite(self, requests: Sequence[EditRequest]) -> str:
        cases = ", ".join(str(request.case_id) for request in requests)
        message = f"the update of case {cases} is not finite; the model was left as it was"
        if self.non_finite == "raise":
            raise NonFiniteChange(f"{message}. `non_finite=skip` goes on with the next edit")
        rank_zero_warn(f"{message} and the edit skipped")
        return "the update is not finite"

    def edits(self) -> dict[str, Any]:
        """Return what the edits so far have done to the matrices, and what is remembered of them; not a copy."""
        matrices = {name: matrix.state_dict() for name, matrix in self.edited_matrices().items()}
        return {"matrices": matrices, "memory": dict(self.memory())}

    def load_edits(self, edits: Mapping[str, Any]) -> None:
        """Take up what :meth:`edits` returned and write the weights, bit for bit."""
        for name, matrix in self.edited_matrices().items():
            matrix.load_state_dict(edits["matrices"][name])
        self.load_memory({name: tensor.to(self.device) for name, tensor in edits["memory"].items()})

    def take_back(self, before: Mapping[str, Any], reason: str) -> None:
        """Undo the latest step, whatever was restrained since: it counts as handled, and as refused.

        Args:
            before: A copy of what :meth:`edits` returned before the step.
            reason: Why.
        """
        assert self.last_report is not None
        self.load_edits(before)
        self.observed = {}
        self.last_report = replace(self.last_report, applied=False, refused=reason)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the edits did to the weights and what the method remembers; never the model."""
        checkpoint["state_dict"] = {}
        checkpoint["edits"] = {
            "num_edits": self.num_edits,
            "num_steps": self.num_steps,
            "originals": {name: fingerprint(m.original()) for name, m in self.edited_matrices().items()},
            **self.edits(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what a checkpoint held until everything is prepared."""
        self.go_on = partial(self._load, checkpoint["edits"])

    def _load(self, edits: Mapping[str, Any]) -> None:
        matrices = self.edited_matrices()
        if edits["originals"] != {name: fingerprint(matrix.original()) for name, matrix in matrices.items()}:
            raise UserError("the checkpoint was written for another model, or for other layers of this one")
        self.load_edits(edits)
        self.num_edits, self.num_steps = edits["num_edits"], edits["num_steps"]

    def _compare_processes(self, before: int) -> None:
        """Raise, every so many edits, if the processes' edited weights have drifted apart."""
        if self.num_edits // COMPARE_EVERY == before // COMPARE_EVERY:
            return
        prints = [fingerprint(matrix.weight()) for matrix in self.edited_matrices().values()]
        if broadcast(prints) != prints:
            raise MisconfigurationException(
                f"after {self.num_edits} edits this process's weights differ from the first one's; are the devices of "
                "one kind?"
            )

    def on_train_batch_end(self, outputs: Any, batch: EditBatch, batch_idx: int) -> None:
        """Put the unedited model back where the protocol says so; every callback has seen the edited one by now."""
        if batch.from_base:
            self.restore()
