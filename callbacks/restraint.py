"""The base of all restraints: which matrices, when, and relative to what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from prune_lightning.errors import UserError, near
from prune_lightning.types import HasEditedMatrices, RestrainedMatrix

from ._snapshot import matching_matrices

_SCHEDULES = ("each", "every_n", "end")
_ACCUMULATE = ("raw", "restrained")


class SpectralRestraint(L.Callback, ABC):
    r"""Restrains the accumulated change of weight matrices against their originals: :math:`W = W_0 + R(\Delta)`.

    A restraint implements :meth:`restrain`. On an editing module the matrices are those under edit. On any other
    LightningModule the matching parameters are copied when training starts, and the change of an optimizer step is
    what the weights moved by since the last restraint.

    Args:
        parameters: Patterns (``fnmatch``) of parameter names, for modules that are not editing modules; ``None`` for
            the weights of all their Linear and Conv1D layers that are trained.
        schedule: ``each`` step, ``every_n`` steps, or at the ``end`` (the paper's offline procedure: the edits go on
            unrestrained, and what is evaluated or left at the end is a restrained snapshot).
        every_n: Steps between two restraints under ``every_n``.
        accumulate: What is restrained. ``raw``: the sum of the updates as they were computed, so that the weights are
            at any moment the restraint of all updates so far. ``restrained``: the already restrained change plus
            what came since, restrained again.

    Raises:
        UserError: An unknown schedule or way to accumulate.
    """

    def __init__(
        self,
        parameters: Sequence[str] | None = None,
        schedule: str = "each",
        every_n: int = 1,
        accumulate: str = "raw",
    ) -> None:
        for name, value, choices in (("schedule", schedule, _SCHEDULES), ("accumulate", accumulate, _ACCUMULATE)):
            if value not in choices:
                raise UserError(f"unknown restraint.{name} {value!r}: {near(value, choices)}")
        if every_n < 1:
            raise UserError(f"restraint.every_n is expected to be at least 1, but got {every_n}")
        self.parameters, self.schedule, self.every_n, self.accumulate = parameters, schedule, every_n, accumulate
        self._matrices: dict[str, RestrainedMatrix] = {}
        self._restored: dict[str, dict[str, Tensor]] = {}
        self._steps = 0
        self._pending = False

    @abstractmethod
    def restrain(self, matrix: RestrainedMatrix, change: Tensor) -> Tensor:
        """Return the restrained change of one matrix; the same object if nothing has to change.

        Args:
            matrix: The matrix, for its reference.
            change: The accumulated change.
        """

    def should_restrain(self, steps: int, last: bool) -> bool:
        """Whether to restrain after this many steps.

        Args:
            steps: Steps since training started.
            last: This is the last step.
        """
        if self.schedule == "end":
            return last
        return last or self.schedule == "each" or steps % self.every_n == 0

    def restrain_all(self) -> None:
        """Restrain every matrix now."""
        with torch.no_grad():
            for matrix in self._matrices.values():
                change = matrix.raw if self.accumulate == "raw" else matrix.delta
                restrained = self.restrain(matrix, change)
                if restrained is not matrix.delta:
                    matrix.set_delta(restrained)
        self._pending = False

    @contextmanager
    def restrained_snapshot(self) -> Iterator[None]:
        """Restrain inside the block only; a change that is restrained already is left as it is."""
        if not self._pending:
            yield
            return
        saved = {name: matrix.delta for name, matrix in self._matrices.items()}
        self.restrain_all()
        try:
            yield
        finally:
            for name, delta in saved.items():
                self._matrices[name].set_delta(delta)
            self._pending = True

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies under which no rank holds whole matrices."""
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole weight matrices, which {type(trainer.strategy).__name__} does not "
                "keep; use a single device or `strategy='ddp'`"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take hold of the matrices and their originals."""
        if isinstance(pl_module, HasEditedMatrices):
            self._matrices = dict(pl_module.edited_matrices())
            if self.schedule == "end":
                pl_module.evaluation_view = self.restrained_snapshot
        else:
            matrices = matching_matrices(pl_module, self.parameters)
            for name, matrix in matrices.items():
                if name in self._restored:
                    matrix.load_state_dict(self._restored[name])
            self._matrices, self._restored = {**matrices}, {}
        self._steps = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restrain if the optimizer has stepped and the schedule says so."""
        if trainer.global_step == self._steps:
            return
        self._steps, self._pending = trainer.global_step, True
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self.should_restrain(self._steps, last or trainer.global_step == trainer.max_steps):
            self.restrain_all()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restrain what the last steps left, where training ended early."""
        if self._pending and self.should_restrain(self._steps, last=True):
            self.restrain_all()

    @property
    @override
    def state_key(self) -> str:
        """Two restraints with different arguments keep their states apart."""
        return self._generate_state_key(parameters=self.parameters, schedule=self.schedule, accumulate=self.accumulate)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return originals and raw sums of the matrices that this callback keeps itself."""
        kept = {name: matrix for name, matrix in self._matrices.items() if hasattr(matrix, "state_dict")}
        return {"matrices": {name: matrix.state_dict() for name, matrix in kept.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what a checkpoint held until training starts."""
        self._restored = state_dict["matrices"]
