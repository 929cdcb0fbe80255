"""Guards that check an update before it is written: its norm, its key, the optimisation of its value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from prune_lightning.errors import UserError, one_of
from prune_lightning.ranges import NonNegative, Positive, Share, Whole
from prune_lightning.types import Update, norm_of_all

POLICIES = ("warn", "skip", "rollback", "stop")


@dataclass(frozen=True)
class Finding:
    """A problem that a guard found in a step.

    Args:
        reason: Description for the log.
        figures: The figures that it is based on.
    """

    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


class UpdateGuard(ABC):
    """Base of the guards that check an update before it is written.

    Args:
        policy: What to do about a finding; ``None`` for the policy of all guards.

    Raises:
        UserError: An unknown policy.
    """

    def __init__(self, policy: str | None = None) -> None:
        if policy is not None:
            one_of("guards.policy", policy, POLICIES)
        self.policy = policy

    @abstractmethod
    def look(self, updates: Mapping[str, Update], details: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Check a finite update and return a finding, or ``None``.

        Args:
            updates: The update of each edited part, by its name.
            details: What the method reports of each request of the step.
        """

    def written(self, norm: float) -> None:  # noqa: B027 - most guards keep no state
        """Record an update that stays in the weights.

        Args:
            norm: Frobenius norm over everything that it changes.
        """


class NormGuard(UpdateGuard):
    """Finds an update whose norm is many times the median norm of the earlier updates.

    Args:
        factor: Largest ratio to the median that passes.
        after: Number of earlier updates before the guard becomes active.
        policy: See :class:`UpdateGuard`.

    Raises:
        UserError: ``factor`` is at most 1, or ``after`` is less than 1.
    """

    def __init__(self, factor: Positive = 10.0, after: Whole = 10, policy: str | None = None) -> None:
        super().__init__(policy)
        if not (factor > 1 and after >= 1):
            raise UserError(f"guards.norm expects `factor` > 1 and `after` >= 1, but got {factor} and {after}")
        self.factor, self.after = factor, after
        self._norms: list[float] = []  # ascending

    @override
    def look(self, updates: Mapping[str, Update], details: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Compare the norm with the lower median so far."""
        if len(self._norms) < self.after:
            return None
        norm, median = norm_of_all(updates), self._norms[(len(self._norms) - 1) // 2]
        if norm <= self.factor * median:
            return None
        times = norm / median if median else math.inf
        return Finding(f"the update is {times:.3g} times as large as the median", {"norm": norm, "median": median})

    @override
    def written(self, norm: float) -> None:
        """Add the norm to those that later updates are compared with."""
        insort(self._norms, norm)


class KeyGuard(UpdateGuard):
    r"""Finds ROME's ill-posed key: :math:`u^\top k` small against :math:`u^\top \bar k`, or negative.

    The ratio of the two is ``key_ratio``, and the update's norm is 1/``key_ratio`` times R-ROME's. Methods that do not
    report ``key_ratio`` are not checked.

    Args:
        least: Smallest ``key_ratio`` that passes.
        policy: See :class:`UpdateGuard`.
    """

    def __init__(self, least: NonNegative = 0.1, policy: str | None = None) -> None:
        super().__init__(policy)
        self.least = least

    @override
    def look(self, updates: Mapping[str, Update], details: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Check the smallest ratio of the step."""
        ratio = min((detail["key_ratio"] for detail in details if "key_ratio" in detail), default=math.inf)
        if ratio >= self.least:
            return None
        return Finding(f"the key is ill-posed: u'k is {ratio:.3g} of what it should be", {"key_ratio": ratio})


class AnchorGuard(UpdateGuard):
    """Finds a value whose norm is many times that of the unedited model, which announces a collapse.

    Only where that norm is known: with an anchor (``method.value.anchor``), or with ``method.value.anchor_norm`` alone,
    which rescales nothing. The norm is that before a rescaling. NAS leaves out such edits: ``policy=skip``.

    Args:
        most: Largest ``norm_ratio`` that passes.
        policy: See :class:`UpdateGuard`.
    """

    def __init__(self, most: float = 2.0, policy: str | None = None) -> None:
        super().__init__(policy)
        self.most = most

    @override
    def look(self, updates: Mapping[str, Update], details: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Check the largest ratio of the step."""
        ratio = max((detail["norm_ratio"] for detail in details if "norm_ratio" in detail), default=0.0)
        if ratio <= self.most:
            return None
        return Finding(f"the value's norm is {ratio:.3g} times that of the unedited model", {"norm_ratio": ratio})


class ValueGuard(UpdateGuard):
    """Finds a value optimisation that failed: the loss did not fall, or the target is still improbable.

    Methods that report neither losses nor the target's probability are not checked.

    Args:
        least_probability: Smallest final probability of the target that passes; for a target of several tokens, their
            geometric mean.
        policy: See :class:`UpdateGuard`.
    """

    def __init__(self, least_probability: Share = 0.01, policy: str | None = None) -> None:
        super().__init__(policy)
        self.least_probability = least_probability

    @override
    def look(self, updates: Mapping[str, Update], details: Sequence[Mapping[str, Any]]) -> Finding | None:
        """Check every request; the first finding is returned."""
        for number, detail in enumerate(details, start=1):
            losses = detail.get("losses") or [0.0]
            probability = detail.get("target_probability", 1.0)
            which = f" of request {number}" if len(details) > 1 else ""
            if len(losses) > 1 and not losses[-1] < losses[0]:
                reason = f"the loss{which} went from {losses[0]:.3g} to {losses[-1]:.3g}"
                return Finding(reason, {"first_loss": losses[0], "last_loss": losses[-1]})
            if not probability >= self.least_probability:
                reason = f"the target{which} came to a probability of {probability:.2g} only"
                return Finding(reason, {"target_probability": probability})
        return None
