"""A few fixed sentences whose perplexity is an early sign of model collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prune_lightning.bundled.abilities import plain_text
from prune_lightning.errors import UserError
from prune_lightning.evaluation.scoring import token_nll
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Positive

NUM_SENTENCES = 8  # of the bundled text: plain English without real people, so that no edit concerns it


@dataclass
class PerplexityReading:
    """The perplexity at one point of the stream.

    Args:
        num_requests: Requests handled.
        perplexity: Over all tokens of the sentences but the first of each; may be infinite or NaN.
        relative: Divided by the unedited model's perplexity.
        kept: Whether the latest step was kept and not undone after this reading.
    """

    num_requests: int
    perplexity: float
    relative: float
    kept: bool = True


class Sentinel:
    """Perplexity of a few fixed sentences, relative to the unedited model's.

    Args:
        every_n: Requests between two readings.
        factor: A relative perplexity above this is a failure.
        readings: Number of consecutive readings above ``factor`` that count as a collapse.
        path: A text file with one sentence per line; ``None`` for bundled sentences.
        policy: What to do after a failure; ``None`` for the policy of all guards. The edit is already written, so it
            cannot be skipped. Under ``rollback`` there is a reading after every step.

    Raises:
        UserError: Settings are out of range, or the file cannot be read.
    """

    def __init__(
        self,
        every_n: Count = 10,
        factor: Positive = 10.0,
        readings: Count = 3,
        path: str | None = None,
        policy: str | None = None,
    ) -> None:
        if not (every_n >= 1 and factor > 1 and readings >= 1):
            raise UserError(
                "guards.perplexity expects `every_n` and `readings` of at least 1 and `factor` > 1, but got "
                f"{every_n}, {readings} and {factor}"
            )
        if policy not in (None, "warn", "rollback", "stop"):
            raise UserError(
                f"guards.perplexity checks edits that are written, so it can warn, rollback or stop, not {policy!r}"
            )
        self.every_n, self.factor, self.readings, self.policy = every_n, factor, readings, policy
        self.sentences = _bundled() if path is None else _lines(Path(path).expanduser())
        self.first = math.nan
        self.above = 0

    def begin(self, model: LanguageModel) -> None:
        """Read the unedited model's perplexity.

        Raises:
            UserError: The perplexity is not finite, or there is no token to score.
        """
        self.first, self.above = self._perplexity(model), 0
        if not math.isfinite(self.first):
            raise UserError("guards.perplexity: the unedited model gives the sentences no finite perplexity")

    def read(self, model: LanguageModel, num_requests: int) -> PerplexityReading:
        """Read the model's current perplexity."""
        perplexity = self._perplexity(model)
        return PerplexityReading(num_requests, perplexity, perplexity / self.first)

    def wrong(self, relative: float) -> bool:
        """Whether a relative perplexity is NaN or above the factor."""
        return not relative <= self.factor

    def count(self, relative: float) -> bool:
        """Count a reading of a model that is kept; return whether it completes a collapse."""
        self.above = self.above + 1 if self.wrong(relative) else 0
        return self.above >= self.readings

    def _perplexity(self, model: LanguageModel) -> float:
        nll, count = token_nll(model, self.sentences)
        return float(torch.exp(nll.double().sum() / count.sum()))


def _bundled() -> Sequence[str]:
    return [item.text() for item in plain_text().test[:NUM_SENTENCES]]


def _lines(path: Path) -> Sequence[str]:
    try:
        found = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"guards.perplexity.path: {str(path)!r} cannot be read: {error}") from error
    if not found:
        raise UserError(f"guards.perplexity.path: {str(path)!r} holds no sentence")
    return found
