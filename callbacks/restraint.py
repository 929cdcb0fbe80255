"""The base class of all restraints: which matrices are restrained, and when."""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from prune_lightning.errors import UserError, kind_of, one_of
from prune_lightning.methods.base import EditingModule
from prune_lightning.ranges import Count
from prune_lightning.spectral import HasEditedMatrices, RestrainedMatrix
from prune_lightning.value_types import check_value

from ._lightning import LightningCallback
from ._logging import log_metrics
from ._order import Place, check_order, check_withheld_last
from ._restraint_rule import RestraintRule
from ._snapshot import Originals, SnapshotMatrix, as_patterns, chosen_matrices, matching_matrices
from ._timing import part_of_phase


class Restraint(RestraintRule, LightningCallback, ABC):
    """Restrains the change of weight matrices, after an edit or after a step of an optimizer.

    A restraint implements :meth:`restrain`. On an editing module the matrices are the edited ones. On any other module
    the matching parameters are copied when training starts, and a step is the change of the weights since.

    Works on a single device, under DDP, and under FSDP2 (``ModelParallelStrategy``), where one matrix at a time is
    gathered. In other training loops, call :meth:`attach` before training and :meth:`after_step` after each step.

    The original of a weight is what it was when the restraint first took hold of it. It is kept until :meth:`reset`: a
    second training of the same weights, in the same Trainer or another, is restrained relative to the same original.
    Another module has its own originals; an editing module keeps them itself.

    Args:
        parameters: Patterns (``fnmatch``) of parameter names, or one; ``None`` for all edited matrices, and on other
            modules for the weights of all Linear, Conv1D and LoRA layers that are trained. Of a LoRA layer the matrix
            is the merged weight, its original the base layer's weight.
        schedule: ``each`` step, ``every_n`` steps, or at the ``end``.
        every_n: Steps between two restraints under ``every_n``.
        feedback: Have later edits make up for what is withheld from the weights now, so that the sum of all updates is
            the one without a restraint, for the same values; for the restraint of an editing module, if there is one
            restraint only.

    Attributes:
        matrices: The restrained matrices, by name.
        pending: Whether some steps are not restrained yet.

    Raises:
        UserError: An unknown schedule, ``every_n`` under another schedule, or feedback of what is only withheld at the
            end.
    """

    place: ClassVar[Place] = Place.RESTRAINT
    for_hugging_face: ClassVar[bool] = True

    def __init__(
        self,
        parameters: str | Sequence[str] | None = None,
        schedule: str = "each",
        every_n: Count = 1,
        feedback: bool = False,
    ) -> None:
        one_of("restraint.schedule", schedule, ("each", "every_n", "end"))
        check_value("restraint.every_n", every_n, Count)
        if every_n != 1 and schedule != "every_n":
            raise UserError(f"restraint.every_n={every_n} needs restraint.schedule=every_n, but that is {schedule}")
        if feedback and schedule == "end":
            raise UserError("restraint.feedback: with restraint.schedule=end nothing is withheld before the end")
        self.parameters, self.schedule, self.every_n = as_patterns(parameters), schedule, every_n
        self.feedback = feedback
        self.matrices: dict[str, RestrainedMatrix] = {}
        self._originals = Originals()
        self._restored: dict[str, dict[str, Tensor]] = {}
        self._steps: int | None = None
        self.pending = False

    # -- for any loop ---------------------------------------------------------------------------------------------
    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the latest restraint, under ``restraint/``."""
        return {f"restraint/{name}": value for name, value in self.figures().items()}

    def attach(self, module: nn.Module, steps: int = 0, others: Sequence[Restraint] = ()) -> None:
        """Attach to the matrices of a module and keep their originals.

        Call it when the model is on its device, sharded if it is to be, and before the first step. A weight that this
        restraint has held before keeps its original.

        Args:
            module: The module, or an editing module.
            steps: Number of earlier steps when training resumes.
            others: Further restraints of the same module; matrices are shared with those attached before.

        Raises:
            UserError: It is no module, no matrix is found, training resumes and the checkpoint does not hold the
                originals, or there is nothing that feedback could go to.
        """
        if isinstance(module, type) or not isinstance(module, (nn.Module, HasEditedMatrices)):
            raise UserError(f"{type(self).__name__}.attach expects a torch.nn.Module, but got {kind_of(module)}")
        if others and any(restraint.feedback for restraint in (self, *others)):
            raise UserError("restraint.feedback is for a single restraint: with several, set it to false in each")
        if self.feedback and not isinstance(module, HasEditedMatrices):
            raise UserError("restraint.feedback is for editing modules: an optimizer does not know what a weight lacks")
        self._originals.keep(self.matrices.values())
        self.matrices = {}
        if isinstance(module, HasEditedMatrices):
            module.feed_back(self.feedback)
            self.matrices = chosen_matrices(module.edited_matrices(), self.parameters)
            module.register_restraint(self)
            if not self.matrices:
                rank_zero_warn(
                    f"{type(self).__name__} has nothing to restrain: {type(module).__name__} changes no weights"
                )
        else:
            held = {n: m for other in others for n, m in other.matrices.items() if isinstance(m, SnapshotMatrix)}
            matrices = matching_matrices(module, self.parameters, held)
            for name, matrix in matrices.items():
                if not isinstance(matrix, SnapshotMatrix):
                    continue
                known = self._restored.get(name) or self._originals.of(matrix.parameter)
                if known is not None:
                    matrix.load_state_dict(known)
                elif steps and held.get(name) is not matrix:
                    raise UserError(
                        f"the checkpoint does not hold the original of {name}: it was written without this restraint, "
                        "or with other arguments. Resume with the restraint it was written with, or start a new "
                        "training from these weights as the originals"
                    )
            self.matrices, self._restored = {**matrices}, {}
        self._steps, self.pending = steps, False

    def reset(self) -> None:
        """Forget all originals: the next :meth:`attach` takes the weights as they are then."""
        self.matrices, self._restored, self._originals = {}, {}, Originals()
        self._steps, self.pending = None, False

    def after_step(self, steps: int, last: bool = False, moved: bool = True) -> bool:
        """Restrain if it is due; return whether it did.

        Args:
            steps: Steps since training started; the same number again means that nothing has happened.
            last: This is the last step.
            moved: The step has moved the weights; an edit that was refused has not.

        Raises:
            UserError: :meth:`attach` has not been called.
        """
        self._check_attached()
        if steps != self._steps:
            self._steps, self.pending = steps, self.pending or moved
        due = last or self.schedule == "each" or (self.schedule == "every_n" and steps % self.every_n == 0)
        if not (self.pending and due):
            return False
        self.restrain_all()
        return True

    @torch.no_grad()
    def restrain_all(self) -> None:
        """Restrain every matrix now."""
        self._check_attached()
        for matrix in self.matrices.values():
            if isinstance(matrix, SnapshotMatrix):
                matrix.check()
            self.restrain(matrix)
        self.pending = False

    def _check_attached(self) -> None:
        if self._steps is None:
            raise UserError(
                f"{type(self).__name__} holds no matrices: call `attach(module)` before the first step, when the model "
                "is on its device"
            )

    @contextmanager
    def restrained_snapshot(self) -> Iterator[None]:
        """Restrain what is pending inside the block, then restore it."""
        with ExitStack() as stack:
            for matrix in self.matrices.values() if self.pending else ():
                stack.enter_context(matrix.withholding(self.correction(matrix)))
            yield

    def evaluation_view(self) -> AbstractContextManager[None]:
        """Under ``schedule=end``, restrain the model inside the block as if the stream ended now."""
        return self.restrained_snapshot() if self.schedule == "end" else nullcontext()

    def finish(self) -> None:
        """Restrain permanently what is still pending."""
        if self.pending:
            self.restrain_all()

    def restore_pending(self, pending: bool) -> None:
        """Restore :attr:`pending` when a step is undone."""
        self.pending = pending

    def step_state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs besides the matrices."""
        return {"pending": self.pending}

    def load_step_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state of the latest step."""
        if states:
            self.pending = states[-1]["pending"]

    # -- Lightning ------------------------------------------------------------------------------------------------
    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that cannot provide a whole matrix, and a wrong order of callbacks."""
        if isinstance(pl_module, HasEditedMatrices):
            check_order(trainer)
        served = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
        # DeepSpeed and XLA keep copies of the weights elsewhere; both derive from DDP's strategy.
        if not served or isinstance(trainer.strategy, (DeepSpeedStrategy, XLAStrategy)):
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole weight matrices, one at a time, which "
                f"{type(trainer.strategy).__name__} cannot give. Use a single device, `strategy='ddp'`, or, to train a "
                "model that has to be sharded, FSDP2: `strategy=ModelParallelStrategy()`"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach to the matrices and keep their originals."""
        before = itertools.takewhile(lambda callback: callback is not self, trainer.callbacks)  # type: ignore[attr-defined]
        others = [other for other in before if isinstance(other, Restraint)]
        self.attach(pl_module, trainer.global_step, others)
        check_withheld_last(self, others)

    @override
    @part_of_phase("restraint")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restrain if the optimizer has stepped and a restraint is due."""
        if isinstance(pl_module, EditingModule):
            report = pl_module.run.last_report
            moved = report is not None and report.applied
            last = batch.from_base  # such a step is a whole stream; any other stream ends in `on_train_end`
        else:
            moved = True
            last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
            last = last_epoch or trainer.global_step == trainer.max_steps
        if self.after_step(trainer.global_step, last, moved):
            log_metrics(trainer, pl_module, lambda: self.metrics, always=self.schedule != "each")

    @override
    @part_of_phase("restraint")
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restrain what is still pending."""
        if isinstance(pl_module, EditingModule):
            restrained = self.pending
            pl_module.run.finish()
        else:
            restrained = self.after_step(trainer.global_step, last=True)
        if restrained:
            log_metrics(trainer, pl_module, lambda: self.metrics, always=True)

    @property
    @override
    def state_key(self) -> str:
        """The key of the checkpoint state; it differs between restraints with different arguments."""
        return self._generate_state_key(parameters=self.parameters, schedule=self.schedule, every_n=self.every_n)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the matrices that this callback owns: originals and withheld parts."""
        kept = {name: m.state_dict() for name, m in self.matrices.items() if isinstance(m, SnapshotMatrix)}
        return {"matrices": kept}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._restored = dict(state_dict["matrices"])
