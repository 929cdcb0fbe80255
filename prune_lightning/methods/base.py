"""The editing loop of all methods: compute an update for a batch of requests, write it, and report it."""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from prune_lightning.devices import move_attributes
from prune_lightning.distributed import broadcast, fail_together, true_on_all_ranks
from prune_lightning.errors import UserError
from prune_lightning.methods.edit_run import EditRun
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.methods.edited_part import EditedPart
from prune_lightning.methods.editing_method import EditingMethod
from prune_lightning.methods.no_op_optimizer import NoOpOptimizer
from prune_lightning.methods.run_parts import AttachedRestraint
from prune_lightning.methods.trainer_checks import check_trainer
from prune_lightning.models.adapters import refuse_adapters
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock
from prune_lightning.ranges import Whole
from prune_lightning.types import EditBatch, EditReport, EditRequest, EditStep

COMPARE_EVERY = 100  # requests between two comparisons of the processes' weights


class EditingModule(EditingMethod, L.LightningModule, ABC):
    """Base of all editing methods.

    A method implements :meth:`compute_update`; :class:`~.editing_method.EditingMethod` has what else it may implement.

    Args:
        language_model: The model to edit.
        layers: Indices of the blocks that are edited, ascending; their MLP down-projection unless the method says
            otherwise (:meth:`edited_modules`).
        non_finite: What to do with an update that holds NaN or infinity; see :class:`~.edit_run.EditRun`.
        clock: Measures the time of the run's phases; a new clock by default.

    Attributes:
        facts: What the method reports of :meth:`prepare`, for the run's summary.
        run: The stream of edits on this module: what it edits, its position, what is pending.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        non_finite: str = "skip",
        clock: PhaseClock | None = None,
    ) -> None:
        super().__init__()
        if (self.in_weights and not layers) or list(layers) != sorted(set(layers)):
            raise UserError(f"`layers` is expected to be ascending layer indices, but got {list(layers)}")
        self.automatic_optimization = False
        self.language_model = language_model
        self.layers = tuple(layers)
        for layer in self.layers:
            stores_transposed(language_model.rewrite_module(layer))  # raises if it cannot be edited
        self.facts: dict[str, float] = {}
        self.clock = clock or PhaseClock()
        self.run = EditRun(self.find_parts, self, non_finite, language_model.frozen_mode)
        self.strict_loading = False  # a checkpoint holds what the edits did, not the model
        self._checkpoint: Mapping[str, Any] | None = None
        self._unused = nn.Parameter(torch.zeros(1))  # DDP wraps no module without a trainable parameter

    def stream_window(self, request: EditRequest, size: int) -> list[EditRequest]:
        """Return the window of the stream that contains ``request``.

        The stream is cut into windows of ``size`` requests from its beginning, so that a window's results depend only
        on its position in the stream, not on where a run was resumed.
        """
        requests = getattr(getattr(self._trainer, "datamodule", None), "requests", ())
        start = self.run.num_requests // size * size
        for begin in (start, start + size):  # a batch may reach into the next window
            window = list(requests[begin : begin + size])
            if request in window:
                return window
        return [request]

    @property
    def device(self) -> torch.device:
        """Device of the model, which may have been there before this module was built around it."""
        return self.language_model.device

    def coming_requests(self, count: int) -> list[EditRequest]:
        """Return the first requests of the stream, none without a data module."""
        return list(getattr(getattr(self._trainer, "datamodule", None), "requests", ())[:count])

    # -- what is edited -------------------------------------------------------------------------------------------
    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return the modules whose weight is edited, by the weight's qualified name in the ``transformers`` model.

        The MLP down-projections of :attr:`layers`; a method that edits others names them here.
        """
        model = self.language_model
        return {model.rewrite_name(layer): model.rewrite_module(layer) for layer in self.layers}

    def find_parts(self) -> Mapping[str, EditedPart]:
        """Return what the edits change, by its name: the matrices of :meth:`edited_modules`. Called once."""
        return {name: EditedMatrix.of(name, module) for name, module in self.edited_modules().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EditingModule:
        """Move the state of the run and of the method together with the module."""
        super()._apply(fn, recurse)
        move_attributes(self, self.language_model.device)
        return self

    def edited_matrices(self) -> Mapping[str, EditedMatrix]:
        """Return the matrices under edit, by the name of their weight; none if the method edits no weight."""
        return {name: part for name, part in self.run.parts.items() if isinstance(part, EditedMatrix)}

    def feed_back(self, on: bool) -> None:
        """Have the next updates make up for what a restraint withholds, or no longer; see :attr:`takes_feedback`."""
        if on and not self.takes_feedback:
            raise UserError(
                f"restraint.feedback: {type(self).__name__} does not compute its updates from what the weights lack, "
                "so nothing can be fed back. Use restraint.feedback=false"
            )
        for matrix in self.edited_matrices().values():
            matrix.feeds_back = on

    def register_restraint(self, restraint: AttachedRestraint) -> None:
        """Let a restraint of these matrices take part in the run; see :meth:`.EditRun.register_restraint`."""
        self.run.register_restraint(restraint)

    @property
    def num_requests(self) -> int:
        """Requests handled since the unedited model, refused ones included."""
        return self.run.num_requests

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """Restore what is edited, bit for bit, after the block."""
        with ExitStack() as stack:
            for part in self.run.parts.values():
                stack.enter_context(part.provisional())
            yield

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Restore the unedited model inside the block, then the edited one, bit for bit."""
        with ExitStack() as stack:
            for part in self.run.parts.values():
                stack.enter_context(part.unedited())
            yield

    def edit(self, requests: Sequence[EditRequest]) -> EditReport:
        """Compute the update of some requests and write it, unless it is refused.

        Without a Trainer, call :meth:`prepare` before the first edit and ``run.settle()`` after each.
        """
        started = time.perf_counter()
        self.run.begin_step()
        with fail_together(), self.language_model.frozen_mode():
            updates, details = self.compute_update(requests)
            return self.run.apply(EditStep(tuple(requests), updates, details), started)

    def summary(self) -> dict[str, Any]:
        """Return the number of edits, and :attr:`facts`."""
        return {"num_requests": self.num_requests, "method_facts": self.facts}

    # -- Lightning ------------------------------------------------------------------------------------------------
    def configure_callbacks(self) -> list[L.Callback]:
        """Check model and Trainer before anything runs: this is the first hook that a Trainer calls."""
        refuse_adapters(self.language_model.model)
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer(self.trainer, type(self))
        return []

    def configure_model(self) -> None:
        """Divide the model among the processes under FSDP2."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not self.language_model.is_sharded:
            self.language_model.shard(strategy.root_device.type)

    def configure_optimizers(self) -> NoOpOptimizer:
        """Return an optimizer that does nothing; editing methods keep their inner optimizers to themselves."""
        return NoOpOptimizer(self._unused)

    def transfer_batch_to_device(self, batch: EditBatch, device: torch.device, dataloader_idx: int) -> EditBatch:
        """Requests are text: nothing to move."""
        return batch

    def on_fit_start(self) -> None:
        """Keep the original weights and prepare; by now the Trainer has moved the model."""
        _ = self.run.parts
        with fail_together(), self.clock.phase("prepare"), self.language_model.frozen_mode():
            self.prepare()

    def on_train_start(self) -> None:
        """Restore a checkpoint."""
        self._load_checkpoint()

    def on_train_epoch_start(self) -> None:
        """Count the edits of the stream, now that earlier ones are restored."""
        requests = getattr(self.trainer.datamodule, "requests", ())  # type: ignore[attr-defined]
        self.clock.named("edit").expect(len(requests), done=self.num_requests)

    def on_train_batch_start(self, batch: EditBatch, batch_idx: int) -> int | None:
        """End the epoch if a resumed stream has no edits left."""
        return None if batch.requests else -1

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Write one batch of requests."""
        report = self.edit(batch.requests)
        self.clock.named("edit").advance(len(batch.requests))
        if report.applied:
            self._compare_processes(self.run.num_requests - len(batch.requests))
        self.log_dict(report.figures(), batch_size=len(batch.requests), logger=False)
        counter = self.optimizers()
        assert isinstance(counter, (torch.optim.Optimizer, L.pytorch.core.optimizer.LightningOptimizer))
        counter.step()

    def on_train_batch_end(self, outputs: Any, batch: EditBatch, batch_idx: int) -> None:
        """Settle the step after all callbacks, and restore the unedited model if the protocol says so."""
        self.run.settle()
        if batch.from_base:
            self.run.restore()

    def on_train_end(self) -> None:
        """Finish the stream unless a callback did so."""
        self.run.finish()

    def on_fit_end(self) -> None:
        """Restore a checkpoint of a complete stream, for which training never starts."""
        self._load_checkpoint()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the edits changed and the method's memory, not the model."""
        self.run.settle()  # a checkpoint of the step that has just been made is taken by a callback, before this module
        checkpoint["state_dict"] = {}
        constants = dict(self.constants())
        checkpoint["edits"] = {"originals": self.originals(), "constants": constants, **self.run.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the module is prepared."""
        self._checkpoint = checkpoint["edits"]
        self.load_constants(checkpoint["edits"].get("constants", {}))

    def _load_checkpoint(self) -> None:
        if self._checkpoint is None:
            return
        edits, self._checkpoint = self._checkpoint, None
        if edits["originals"] != self.originals():
            raise UserError("the checkpoint was written for another model, or for other layers of this one")
        self.run.load_state_dict(edits)

    def originals(self) -> dict[str, str]:
        """Return the fingerprints of what the edits apply to, by its name."""
        return {name: part.original_fingerprint() for name, part in self.run.parts.items()}

    def _compare_processes(self, before: int) -> None:
        """Raise if the processes' edited models differ; checked every ``COMPARE_EVERY`` requests."""
        if self.run.num_requests // COMPARE_EVERY == before // COMPARE_EVERY:
            return
        prints = [part.fingerprint() for part in self.run.parts.values()]
        if not true_on_all_ranks(broadcast(prints) == prints):
            raise MisconfigurationException(
                f"after {self.run.num_requests} edits a process's model differs from the first one's; are the "
                "devices of one kind?"
            )
