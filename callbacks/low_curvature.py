"""CrispEdit's projection: train only where the loss on other text has little curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from prune_lightning.costs import Changes, RestraintCost, Work
from prune_lightning.errors import UserError, one_of
from prune_lightning.fingerprint import fingerprint
from prune_lightning.methods.base import EditingModule
from prune_lightning.models.curvature import CurvatureStatistics
from prune_lightning.spectral import AccumulatedChange, FactoredMatrix, LowCurvatureSpace, RestrainedMatrix

from ._adapted import AdaptedMatrix
from ._snapshot import SnapshotMatrix
from .restraint import Restraint

_PREFIX = "curvature."


class LowCurvature(Restraint):
    r"""Keep a training within the directions in which the loss on other text has little curvature.

    The space is that of CrispEdit (https://arxiv.org/abs/2602.15823); see
    :class:`~prune_lightning.spectral.LowCurvatureSpace`. It is computed on the original weights and stays.

    What is projected makes a difference under any optimizer but plain gradient descent:

    - ``update``: the change of the weight, after each step. The weight stays in :math:`W_0` plus the space.
    - ``gradient``: the gradient, before each step, as published. Adam divides every entry by a number of its own and
      weight decay follows the weight, so that the change leaves the space.

    On an editing method with an optimizer of its own (FT) the steps of that optimizer are projected. On other methods
    the update of each edit is, which is dense then; ``gradient`` is refused there. So are matrices under LoRA.

    Args:
        statistics: Where the curvature comes from: :class:`~prune_lightning.models.curvature.BatchCurvature` for any
            training, ``CorpusCurvature`` for editing methods.
        share: :math:`\gamma` in (0, 1), the share of the curvature that is kept out of; the larger, the smaller the
            space.
        project: ``update`` or ``gradient``.
        parameters: See :class:`Restraint`.

    Raises:
        UserError: An argument out of range.
    """

    def __init__(
        self,
        statistics: CurvatureStatistics,
        share: float = 0.99,
        project: str = "update",
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(parameters)
        one_of("restraint.project", project, ("update", "gradient"))
        if not 0 < share < 1:
            raise UserError(f"restraint.share is expected to be between 0 and 1, but got {share}")
        self.statistics, self.share, self.project = statistics, share, project
        self._spaces: dict[str, LowCurvatureSpace] = {}  # by the name of the matrix
        self._known: dict[str, LowCurvatureSpace] = {}  # by the fingerprint of the original
        self._loaded: dict[str, LowCurvatureSpace] = {}  # by name, from a checkpoint
        self._kept: dict[str, float] = {}
        self._inside = False

    # -- the space ------------------------------------------------------------------------------------------------
    @override
    def attach(self, module: nn.Module, steps: int = 0, others: Sequence[Restraint] = ()) -> None:
        """Attach to the matrices and compute the space of each, once per original."""
        super().attach(module, steps, others)
        for matrix in self.matrices.values():
            if isinstance(matrix, AdaptedMatrix):
                raise UserError(
                    f"{matrix.name} is under LoRA: what this projection leaves is no product of its factors. Train the "
                    "whole weight"
                )
        self._inside = isinstance(module, EditingModule) and module.filters_steps
        if self.project == "gradient" and isinstance(module, EditingModule) and not self._inside:
            raise UserError(f"{type(module).__name__} has no gradient of its weights to project: use project=update")
        keys = {name: fingerprint(matrix.original()) for name, matrix in self.matrices.items()}
        self._known |= {keys[name]: space for name, space in self._loaded.items() if name in keys}
        missing = [name for name, key in keys.items() if key not in self._known]
        if missing:
            if isinstance(module, EditingModule):
                with module.unedited():  # it may have edits already
                    factors = self.statistics.factors(module.language_model, missing)
            else:
                factors = self.statistics.factors(module, missing)
            for name in missing:
                outputs, inputs = factors[name]
                self._known[keys[name]] = LowCurvatureSpace(outputs, inputs, self.share, self._dtype(name))
        self._spaces = {name: self._known[key] for name, key in keys.items()}
        self._loaded, self._kept = {}, {}

    def _dtype(self, name: str) -> torch.dtype:
        return self.matrices[name].original().dtype

    def _project(self, name: str, matrix: Tensor) -> Tensor:
        """Return the part in the space, and note its share of the norm."""
        space = self._spaces[name]
        if space.left.device != matrix.device:
            space = self._spaces[name] = space.to(matrix.device)
        inside = space.project(matrix)
        kept, norm = torch.stack([torch.linalg.matrix_norm(each) for each in (inside, matrix)]).tolist()
        self._kept[name] = kept / norm if norm else 1.0
        return inside

    # -- gradients ------------------------------------------------------------------------------------------------
    @override
    def before_step(self) -> None:
        """Project the gradients, under ``project="gradient"``."""
        if self.project == "gradient":
            self._check_attached()
            for name, matrix in self.matrices.items():
                if isinstance(matrix, SnapshotMatrix) and (gradient := matrix.gradient()) is not None:
                    matrix.write_gradient(self._project(name, gradient))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Project the gradients of a module that is no editing method."""
        self.before_step()

    def filter_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of a method's own optimizer, projected under ``project="gradient"``."""
        return self._project(name, gradient) if self.project == "gradient" and name in self.matrices else gradient

    # -- changes --------------------------------------------------------------------------------------------------
    def filter_change(self, name: str, change: Tensor) -> Tensor:
        """Return the change that a method's own optimizer has made, projected under ``project="update"``."""
        return self._project(name, change) if self.project == "update" and name in self.matrices else change

    @override
    def restrain(self, matrix: RestrainedMatrix) -> None:
        """Subtract what of the change is outside of the space, unless the steps themselves are projected."""
        if self.project == "gradient" or self._inside:
            return
        change = matrix.change
        if isinstance(change, AccumulatedChange):
            change = change.master
        elif isinstance(change, FactoredMatrix):
            change = change.dense()
        if change.any():
            matrix.subtract(change - self._project(matrix.name, change))

    # -- figures, cost, state -------------------------------------------------------------------------------------
    @override
    def figures(self) -> dict[str, float]:
        """Return the smallest share of a matrix's directions that are free, and of what was projected that was kept."""
        return {
            "free_share": min((space.free_share for space in self._spaces.values()), default=1.0),
            "kept_norm": min(self._kept.values(), default=1.0),
        }

    @override
    def cost(self, changes: Changes) -> RestraintCost:
        """Return the cost of two bases and a mask per matrix, of three dense copies, and of four products a step."""
        memory = float(sum((m * m + n * n) * changes.entry + m * n for m, n in changes.matrices))
        memory += 3 * max(m * n * changes.entry for m, n in changes.matrices)
        flops = sum(4.0 * m * n * (m + n) for m, n in changes.matrices)
        moved = sum(6.0 * (m * n + m * m + n * n) * changes.entry for m, n in changes.matrices)
        return RestraintCost(memory, Work(flops, moved, 8 * len(changes.matrices)))

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse sharded models, whose curvature would have to be taken in pieces."""
        super().setup(trainer, pl_module, stage)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException("LowCurvature works on a single device or with `strategy='ddp'`")

    @property
    @override
    def state_key(self) -> str:
        """The key of the checkpoint state; it differs between restraints with different arguments."""
        return self._generate_state_key(share=self.share, project=self.project, parameters=self.parameters)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the originals, and the space of each matrix beside its original."""
        state = super().state_dict()
        for name, kept in state["matrices"].items():
            kept |= {f"{_PREFIX}{part}": tensor.cpu() for part, tensor in self._spaces[name].state_dict().items()}
        return state

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        matrices: dict[str, dict[str, Tensor]] = {}
        for name, kept in state_dict["matrices"].items():
            space = {part.removeprefix(_PREFIX): t for part, t in kept.items() if part.startswith(_PREFIX)}
            self._loaded[name] = LowCurvatureSpace.load(space)
            matrices[name] = {part: tensor for part, tensor in kept.items() if not part.startswith(_PREFIX)}
        super().load_state_dict({**state_dict, "matrices": matrices})
