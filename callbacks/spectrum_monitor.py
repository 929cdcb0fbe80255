"""Monitors the singular values of restrained or edited matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from prune_lightning.methods.base import EditingModule
from prune_lightning.ranges import Count
from prune_lightning.report.plots import Spectra, plot_spectra, show_figure
from prune_lightning.report.trajectories import log_growth
from prune_lightning.spectral import (
    AccumulatedChange,
    FactoredMatrix,
    HasEditedMatrices,
    RestrainedMatrix,
    effective_rank,
    singular_values,
    stable_rank,
)
from prune_lightning.value_types import check_value

from ._lightning import LightningCallback
from ._logging import axis, log_metrics
from ._snapshot import Originals, SnapshotMatrix, as_patterns, chosen_matrices, matching_matrices
from ._timing import part_of_phase
from .restraint import Restraint


class SpectrumMonitor(LightningCallback):
    r"""Log each matrix's singular values, and plot them.

    Under ``spectrum/NAME/``: ``sigma_max``, ``sigma_min`` and ``condition_number`` of the live weight, and
    ``condition_number_clipped``, the same with the smallest one at least 1e-6 of the largest; ``norm_ratio``, its
    Frobenius norm relative to the original's; ``delta_norm_ratio``, ``delta_sigma_max``, ``delta_stable_rank`` and
    ``delta_effective_rank`` of its change, and ``delta_num_above``, the number of its singular values above
    the largest one of the original. They are read before the first step, every ``every_n`` steps, and at the end, when
    the spectra are plotted for loggers that accept figures. List it after the restraint.

    Args:
        every_n: Steps between two readings; each costs two decompositions per matrix.
        parameters: See :class:`Restraint`; by default all edited matrices, and on other modules the matrices of the
            restraints in the same Trainer, if there are any.
        draw: Plot the spectra at the end.

    Raises:
        UserError: ``every_n`` is less than 1.

    Attributes:
        curve: The values of each reading, with its ``step``: the number of edits or of optimizer steps.
    """

    def __init__(self, every_n: Count = 10, parameters: str | Sequence[str] | None = None, draw: bool = True) -> None:
        check_value("SpectrumMonitor.every_n", every_n, Count)
        self.every_n, self.parameters, self.draw = every_n, as_patterns(parameters), draw
        self.matrices: dict[str, RestrainedMatrix] = {}
        self.curve: list[dict[str, float]] = []
        self._original: dict[str, Tensor] = {}
        self._originals = Originals()
        self._steps = -1
        self._reported = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new curve, and find the matrices anew; a weight that was watched before keeps its original."""
        self._originals.keep(self.matrices.values())
        self.matrices, self.curve, self._original, self._steps, self._reported = {}, [], {}, -1, 0

    @override
    @part_of_phase("spectrum")
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first step, when every restraint is attached, find the matrices and read them."""
        if not self.matrices:
            self.matrices = self._find(trainer, pl_module)
            if not self.curve:
                self._read(trainer, pl_module)

    def step_state(self) -> dict[str, Any]:
        """Return the readings since the last call."""
        fresh, self._reported = self.curve[self._reported :], len(self.curve)
        return {"readings": fresh} if fresh else {}

    def load_step_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore earlier readings."""
        self.curve = [reading for state in states for reading in state["readings"]]
        self._reported = len(self.curve)

    def summary(self) -> dict[str, Any]:
        """Return every reading, and how fast the norms grow."""
        return {"spectrum": {"curve": self.curve, "log_growth": log_growth(self.curve)}}

    def _find(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, RestrainedMatrix]:
        if isinstance(module, HasEditedMatrices):
            return chosen_matrices(module.edited_matrices(), self.parameters)
        restraints = [c for c in trainer.callbacks if isinstance(c, Restraint)]  # type: ignore[attr-defined]
        held = {name: matrix for restraint in restraints for name, matrix in restraint.matrices.items()}
        if held and self.parameters is None:
            return held
        shared = {name: matrix for name, matrix in held.items() if isinstance(matrix, SnapshotMatrix)}
        matrices = matching_matrices(module, self.parameters, shared)
        for name, matrix in matrices.items():
            if isinstance(matrix, SnapshotMatrix) and shared.get(name) is not matrix:
                matrix.load_state_dict(self._originals.of(matrix.parameter) or matrix.state_dict())
        return {**matrices}

    def reset(self) -> None:
        """Forget all originals; see :meth:`.Restraint.reset`."""
        self.matrices, self._originals = {}, Originals()

    @override
    @part_of_phase("spectrum")
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the spectra every ``every_n`` steps."""
        if trainer.global_step != self._steps and trainer.global_step % self.every_n == 0:
            self._read(trainer, pl_module)

    @override
    @part_of_phase("spectrum")
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the spectra of the final weights and plot them."""
        if isinstance(pl_module, EditingModule):
            pl_module.run.finish()
        restraints = [c for c in trainer.callbacks if isinstance(c, Restraint)]  # type: ignore[attr-defined]
        changed = any(restraint.schedule != "each" for restraint in restraints)  # perhaps, since the latest reading
        if changed and trainer.global_step == self._steps:
            self.curve.pop()
            self._reported = min(self._reported, len(self.curve))
        if changed or trainer.global_step != self._steps:
            self._read(trainer, pl_module)
        if self.draw and (figure := plot_spectra(spectra(self.matrices.values()))):
            for logger in trainer.loggers:
                show_figure(logger, "spectra", figure, step=axis(trainer, pl_module))

    def _read(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._steps = trainer.global_step
        figures = {
            f"spectrum/{name}/{key}": value
            for name, matrix in self.matrices.items()
            for key, value in self._figures(matrix).items()
        }
        self.curve.append({"step": axis(trainer, module), **figures})
        log_metrics(trainer, module, lambda: figures, always=True)

    def _figures(self, matrix: RestrainedMatrix) -> dict[str, float]:
        if matrix.name not in self._original:
            self._original[matrix.name] = singular_values(matrix.original())
        original = self._original[matrix.name]
        weight, delta = singular_values(matrix.weight()), singular_values(matrix.delta())
        return {
            "sigma_max": float(weight[0]),
            "sigma_min": float(weight[-1]),
            "condition_number": float(weight[0] / weight[-1]),
            "condition_number_clipped": float(weight[0] / weight[-1].clamp_min(1e-6 * weight[0])),
            "norm_ratio": float(weight.norm() / original.norm()),
            "delta_norm_ratio": float(delta.norm() / original.norm()),
            "delta_sigma_max": float(delta[0]),
            "delta_stable_rank": stable_rank(delta),
            "delta_effective_rank": effective_rank(delta),
            "delta_num_above": float((delta > original[0]).sum()),
        }


def spectra(matrices: Iterable[RestrainedMatrix]) -> list[Spectra]:
    """Return the singular values of matrices and of their changes, with and without the withheld part."""
    result = []
    for matrix in matrices:
        change = matrix.change
        if isinstance(change, AccumulatedChange):
            change = change.master
        elif isinstance(change, FactoredMatrix):
            change = change.dense()
        tensors = {
            "original": matrix.original(),
            "edited": matrix.original().to(change) + change,
            "restrained": matrix.weight(),
            "change": change,
            "restrained_change": matrix.delta(),
        }
        sigma = {name: singular_values(tensor).cpu().numpy() for name, tensor in tensors.items()}
        result.append(Spectra(matrix.name, **sigma))
    return result
