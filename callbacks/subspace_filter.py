"""Filters that keep a change out of the original's leading singular directions: REVIVE and SPHERE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from typing_extensions import override

from prune_lightning.costs import FP64, Changes, RestraintCost, Work
from prune_lightning.errors import UserError, one_of
from prune_lightning.fingerprint import fingerprint
from prune_lightning.spectral import (
    AccumulatedChange,
    FactoredMatrix,
    RestrainedMatrix,
    Subspace,
    leading_directions,
)
from prune_lightning.spectral.subspace import ENERGIES
from prune_lightning.types import LowRankUpdate

from ._adapted import AdaptedMatrix
from .restraint import Restraint

SIDES = ("both", "input", "output")


class SubspaceFilter(Restraint):
    r"""Take out of the change the part in the leading singular directions of the original matrix.

    .. math:: W = W_0 + (I - \alpha UU^\top)\,\Delta\,(I - \alpha VV^\top)

    with :math:`U, V` the fewest leading singular vectors of :math:`W_0` that hold a share of its energy. Two published
    filters are settings of this one:

    - REVIVE (https://arxiv.org/abs/2601.11042): both sides, :math:`\alpha = 1`.
    - SPHERE (https://arxiv.org/abs/2510.01172): ``sides="input"``, ``unit_rows=True``, :math:`\alpha` 0.5 or 0.8. Its
      paper takes the directions from the original, as here; its code takes them from the weights before each batch.

    The sum of all steps is kept and what the filter takes out is withheld from the weight. The filter is linear, so
    this equals filtering every step. Matrices under LoRA are refused: what is left has another row space.

    Args:
        share: Share of the energy that the directions hold, in (0, 1].
        sides: ``both``, ``input`` (:math:`V`) or ``output`` (:math:`U`).
        strength: :math:`\alpha` in (0, 1].
        energy: ``sigma2`` (squares of the singular values) or ``sigma``.
        unit_rows: Scale the rows of :math:`W_0` to length one before the decomposition.
        parameters: See :class:`Restraint`.
        schedule: See :class:`Restraint`.
        every_n: See :class:`Restraint`.
        feedback: See :class:`Restraint`. The weight is then the filtered solution for all values at once.

    Raises:
        UserError: An argument out of range.
    """

    def __init__(
        self,
        share: float = 0.5,
        sides: str = "both",
        strength: float = 1.0,
        energy: str = "sigma2",
        unit_rows: bool = False,
        parameters: str | Sequence[str] | None = None,
        schedule: str = "each",
        every_n: int = 1,
        feedback: bool = False,
    ) -> None:
        super().__init__(parameters, schedule, every_n, feedback)
        one_of("restraint.sides", sides, SIDES)
        one_of("restraint.energy", energy, ENERGIES)
        if not (0 < share <= 1 and 0 < strength <= 1):
            raise UserError(
                f"restraint.share and restraint.strength are expected to be in (0, 1], but got {share} and {strength}"
            )
        self.share, self.sides, self.strength = share, sides, strength
        self.energy, self.unit_rows = energy, unit_rows
        self._subspaces: dict[str, Subspace] = {}  # by the name of the matrix
        self._known: dict[str, Subspace] = {}  # by the fingerprint of the original
        self._removed: dict[str, float] = {}

    @override
    def attach(self, module: nn.Module, steps: int = 0, others: Sequence[Restraint] = ()) -> None:
        """Attach to the matrices and find their leading directions, once per original."""
        super().attach(module, steps, others)
        for matrix in self.matrices.values():
            if isinstance(matrix, AdaptedMatrix):
                raise UserError(
                    f"{matrix.name} is under LoRA: what this filter leaves of the change is not a product with its "
                    "factors' row space. Train the whole weight, or use a spectral restraint"
                )
        self._removed = {}
        self._subspaces = {name: self._subspace(matrix) for name, matrix in self.matrices.items()}

    def _subspace(self, matrix: RestrainedMatrix) -> Subspace:
        original = matrix.original()
        key = fingerprint(original)
        if key not in self._known:
            try:
                found = leading_directions(original, self.share, self.energy, self.unit_rows)
            except UserError as error:
                raise UserError(f"{matrix.name}: {error}; name the matrices to filter with `parameters`") from error
            left = found.left if self.sides != "input" else None
            right = found.right if self.sides != "output" else None
            self._known[key] = Subspace(left, right, self.strength)
        return self._known[key]

    @property
    @override
    def withholds(self) -> bool:
        """Always."""
        return True

    @override
    def restrain(self, matrix: RestrainedMatrix) -> None:
        """Withhold from the weight what the filter takes out of the sum of all steps."""
        removed = self.correction(matrix)
        norm = _norm(matrix.change)
        self._removed[matrix.name] = removed.norm() / norm if removed is not None and norm else 0.0
        matrix.withhold(removed)

    @override
    def correction(self, matrix: RestrainedMatrix) -> LowRankUpdate | None:
        """Return what the filter takes out of the sum of all steps."""
        if matrix.name not in self._subspaces:  # a replay restrains matrices that nothing has attached to
            self._subspaces[matrix.name] = self._subspace(matrix)
        return self._subspaces[matrix.name].removed(matrix.change)

    @override
    def figures(self) -> dict[str, float]:
        """Return the largest number of directions of a matrix, and the largest share of a change that was taken out."""
        return {
            "num_directions": max((each.num_directions for each in self._subspaces.values()), default=0),
            "removed_share": max(self._removed.values(), default=0.0),
            "rounding_loss": max((matrix.rounding_loss() for matrix in self.matrices.values()), default=0.0),
        }

    @override
    def cost(self, changes: Changes) -> RestraintCost:
        r"""Return the cost of the directions and of what is taken out, in fp64.

        A share :math:`\tau` of the energy is held by at most :math:`\lceil \tau \min(m, n) \rceil` directions. Each
        step multiplies them with the factors of the change, or with the dense change, and writes the weight.
        """
        two = 2 if self.sides == "both" else 1
        memory, largest, work = 0.0, 0.0, Work()
        for i, (m, n) in enumerate(changes.matrices):
            directions = math.ceil(self.share * min(m, n))
            final = changes.ranks[i] if changes.ranks else min(m, n)
            held = float({"both": m + n, "input": n, "output": m}[self.sides] * directions)
            memory += FP64 * (held + (m + n) * two * min(final, directions))
            largest = max(largest, FP64 * (m * n if changes.ranks is None else (m + n) * final))
            halfway = changes.halfway[i] if changes.halfway else None
            times = 2.0 * m * n if halfway is None else 2.0 * (m + n) * halfway
            rank = two * min(directions, halfway or directions)
            work = work + Work(
                2.0 * m * n * rank, 3.0 * m * n * changes.entry, 20, flops64=2 * two * times * directions
            )
        steps = {"each": 1.0, "every_n": 1.0 / self.every_n, "end": 0.0}[self.schedule]
        return RestraintCost(memory + largest, work * steps)

    @property
    @override
    def state_key(self) -> str:
        """The key of the checkpoint state; it differs between filters with different arguments."""
        return self._generate_state_key(
            share=self.share,
            sides=self.sides,
            strength=self.strength,
            energy=self.energy,
            unit_rows=self.unit_rows,
            parameters=self.parameters,
            schedule=self.schedule,
            every_n=self.every_n,
            feedback=self.feedback,
        )


def _norm(change: torch.Tensor | AccumulatedChange | FactoredMatrix) -> float:
    if isinstance(change, AccumulatedChange):
        change = change.factored() or change.master
    return change.norm() if isinstance(change, FactoredMatrix) else float(torch.linalg.matrix_norm(change))
