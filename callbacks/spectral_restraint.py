"""Restraints that apply a law to the singular values of the accumulated change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from prune_lightning.costs import FP64, Changes, RestraintCost, Work
from prune_lightning.errors import UserError, kind_of, one_of
from prune_lightning.fingerprint import fingerprint
from prune_lightning.ranges import Count
from prune_lightning.spectral import (
    Guarded,
    HasEditedMatrices,
    Logarithm,
    NonFiniteChange,
    RestrainedMatrix,
    RestraintLaw,
    SpectralCorrection,
    sigma_max,
    spectral_correction,
)
from prune_lightning.types import LowRankUpdate

from ._adapted import AdaptedMatrix
from .restraint import Restraint


class SpectralRestraint(Restraint):
    r"""Apply a law to the singular values of the change above the largest one of the original matrix.

    .. math:: W = W_0 + U F(\Sigma) V^\top, \qquad \Delta = U \Sigma V^\top,\ \bar s = \sigma_{\max}(W_0)

    This is exact, but only singular triplets above :math:`\bar s` are computed. On editing modules the factors of the
    accumulated change are used; otherwise a norm, block Lanczos or a full decomposition, whichever suffices first.

    Args:
        law: The law :math:`F`, e.g. ``HardClip()`` or any callable ``law(sigma, reference)``; see
            ``prune_lightning.spectral``.
        parameters: See :class:`Restraint`.
        schedule: See :class:`Restraint`. ``end`` is the paper's offline procedure: the edits are unrestrained;
            evaluations and the final model are restrained.
        every_n: See :class:`Restraint`.
        accumulate: What the law is applied to. ``raw``: the sum of all steps as computed. ``restrained``: the
            restrained change of the earlier steps plus the steps since. ``None`` for ``raw`` on editing modules, which
            know each update, and ``restrained`` elsewhere, where the optimizer continues from the restrained weight.
        non_finite: What to do with a change that holds NaN or infinity: ``raise``, or ``skip`` the matrix this time
            with a warning. (Editing modules never write a non-finite update.)
        feedback: See :class:`Restraint`. The weight is then the law applied to the solution for all values at once.

    Raises:
        UserError: An unknown schedule, ``accumulate`` or policy, or feedback with ``accumulate=restrained``.
    """

    def __init__(
        self,
        law: RestraintLaw,
        parameters: str | Sequence[str] | None = None,
        schedule: str = "each",
        every_n: Count = 1,
        accumulate: str | None = None,
        non_finite: str = "raise",
        feedback: bool = False,
    ) -> None:
        super().__init__(parameters, schedule, every_n, feedback)
        if isinstance(law, type) or not callable(law):
            raise UserError(f"`law` is expected to be a law, such as HardClip(), but got {kind_of(law)}")
        if accumulate is not None:
            one_of("restraint.accumulate", accumulate, ("raw", "restrained"))
        if feedback and accumulate == "restrained":
            raise UserError(
                "restraint.feedback keeps the sum of all updates: use restraint.accumulate=raw, which comes to the same"
            )
        one_of("restraint.non_finite", non_finite, ("raise", "skip"))
        self.law, self.accumulate, self.non_finite = law, accumulate, non_finite
        self._raw = True
        self._latest: dict[str, SpectralCorrection] = {}
        self._references: dict[str, float] = {}
        self._warned = False
        self._known_references: dict[str, float] = {}  # by the fingerprint of the original matrix

    @override
    def attach(self, module: nn.Module, steps: int = 0, others: Sequence[Restraint] = ()) -> None:
        """Attach to the matrices and compute their references; known references of equal originals are reused."""
        super().attach(module, steps, others)
        self._references, self._latest = {}, {}
        for matrix in self.matrices.values():
            self.reference(matrix)
        self._raw = (self.accumulate or ("raw" if isinstance(module, HasEditedMatrices) else "restrained")) == "raw"
        for matrix in self.matrices.values() if self._raw else ():
            if isinstance(matrix, AdaptedMatrix):
                matrix.withhold(None)  # which says what to do

    @override
    def cost(self, changes: Changes) -> RestraintCost:
        r"""Return the cost of triplets above the threshold.

        With a change of :math:`k` directions: :math:`(m+n)k` fp64 withheld of each matrix, :math:`(m+n)k + 3k^2` of one
        at a time, and a full decomposition of the core at half of the stream, :math:`4(m+n)k + 20k^3`; less where a
        norm proves that nothing exceeds the reference. A dense change is multiplied some thirty times instead.
        """
        steps = {"each": 1.0, "every_n": 1.0 / self.every_n, "end": 0.0}[self.schedule]
        if changes.ranks is None or changes.halfway is None:
            sizes = [m * n for m, n in changes.matrices]
            work = Work(0.0, 30.0 * changes.entry * sum(sizes), 100 * len(sizes), flops64=60.0 * sum(sizes))
            return RestraintCost(float(2 * FP64 * max(sizes)), work * steps)
        held = [((m + n) * k, 3 * k * k) for (m, n), k in zip(changes.matrices, changes.ranks, strict=True)]
        work = Work()
        for (m, n), k in zip(changes.matrices, changes.halfway, strict=True):
            work = work + Work(0.0, 2.0 * m * n * changes.entry, 50, flops64=4.0 * (m + n) * k + 20.0 * k**3)
        memory = FP64 * (sum(a for a, _ in held) + max(a + b for a, b in held))
        return RestraintCost(float(memory), work * steps)

    def reference(self, matrix: RestrainedMatrix) -> float:
        r"""Return :math:`\bar s`, computed once per original matrix."""
        if matrix.name not in self._references:
            original = matrix.original()
            key = fingerprint(original)
            if key not in self._known_references:
                self._known_references[key] = sigma_max(original)
            if not self._known_references[key] > 0:
                raise UserError(
                    f"{matrix.name} is zero or not finite before training, so the restraint has no reference. "
                    "Name the matrices to restrain with `parameters`"
                )
            self._references[matrix.name] = self._known_references[key]
        return self._references[matrix.name]

    @property
    @override
    def withholds(self) -> bool:
        """Whether the law is applied to the sum of all steps as computed."""
        return self._raw

    def _excess(self, matrix: RestrainedMatrix) -> SpectralCorrection | None:
        try:
            return spectral_correction(matrix.change, self.law, self.reference(matrix))
        except NonFiniteChange as error:
            if self.non_finite == "raise":
                raise NonFiniteChange(f"{matrix.name}: {error}; `non_finite=skip` skips this matrix") from error
            rank_zero_warn(f"{matrix.name}: {error}; skipped")
            return None

    @override
    def restrain(self, matrix: RestrainedMatrix) -> None:
        """Apply the law, and either withhold the excess from the weight or subtract it from the change."""
        found = self._excess(matrix)
        if found is None:
            self._latest.pop(matrix.name, None)
            return
        self._latest[matrix.name] = found
        if found.num_above and not found.num_changed:
            self._warn_of_no_effect(matrix, found)
        if self._raw:
            matrix.withhold(found.correction)
        elif found.correction is not None:
            matrix.subtract(found.correction)

    def _warn_of_no_effect(self, matrix: RestrainedMatrix, found: SpectralCorrection) -> None:
        """Say once that a law changes nothing near this reference, where that follows from its base."""
        law, reference = self.law, self.reference(matrix)
        if self._warned or not isinstance(law, Guarded) or law.unchanged_below(reference) <= reference:
            return
        self._warned = True
        if isinstance(law, Logarithm):
            bound, advice = "1 / ln(base)", "use the scale-free law (restraint=prune_scale_free) or a larger base"
        else:
            bound, advice = "sigma_max / ln(base)", "use a base of e or more"
        rank_zero_warn(
            f"{matrix.name}: the restraint has no effect on this change. The law with base {law.base:g} leaves all "
            f"singular values as they are, {found.num_above} of them above the original's sigma_max = {reference:.3g}. "
            f"It changes nothing below {bound} = {law.unchanged_below(reference):.3g}; {advice}"
        )

    @override
    def correction(self, matrix: RestrainedMatrix) -> LowRankUpdate | None:
        """Return the excess."""
        found = self._excess(matrix)
        return found.correction if found else None

    @override
    def figures(self) -> dict[str, float]:
        """Return how much was above the reference and how much the law changed, and how many matrices went which path.

        ``sigma_bound`` is the largest singular value, or an upper bound where a norm was sufficient.
        """
        latest = self._latest.values()
        paths = Counter(found.path for found in latest)
        return {
            "num_above": sum(found.num_above for found in latest),
            "num_changed": sum(found.num_changed for found in latest),
            "sigma_bound": max((found.sigma_before for found in latest), default=0.0),
            "rounding_loss": max((matrix.rounding_loss() for matrix in self.matrices.values()), default=0.0),
            **{f"path_{name}": paths[name] for name in ("certificate", "lanczos", "gram", "svd")},
        }

    @property
    @override
    def state_key(self) -> str:
        """The key of the checkpoint state; it differs between restraints with different arguments."""
        return self._generate_state_key(
            law=describe(self.law),
            parameters=self.parameters,
            schedule=self.schedule,
            every_n=self.every_n,
            accumulate=self.accumulate,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return originals, withheld parts, and the references by fingerprint."""
        return {**super().state_dict(), "references": dict(self._known_references)}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        super().load_state_dict(state_dict)
        self._known_references |= state_dict["references"]


def describe(law: RestraintLaw) -> str:
    """Return a name of a law that is the same in every process."""
    return repr(law) if is_dataclass(law) else getattr(law, "__qualname__", type(law).__qualname__)
