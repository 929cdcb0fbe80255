"""Prompts of other facts that are worded like an edit's own, from the edits that train an editor."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

from prune_lightning.errors import UserError
from prune_lightning.ranges import Count, Positive, Share
from prune_lightning.types import EditRequest


class Comparing(Protocol):
    """Compares texts, such as :class:`~prune_lightning.methods.retrieval.SharedWords`."""

    def read(self, text: str) -> Any:
        """Return what is compared of a text."""

    def compare(self, query: Any, texts: Sequence[Any]) -> list[float]:
        """Return the similarity of a text with each of several."""


class HardNegatives:
    r"""Draws prompts among the neighbours of an edit's prompt.

    Neighbours are ordered by their similarity :math:`c`. The closest ones may be the same fact in other words, so only
    some ranks behind them are drawn from, with weights :math:`\exp(c / \tau)`. Requests with the subject and the old
    answer of the edit are the same fact, and are left out.

    Args:
        similarity: Compares prompts.
        first: First rank that is drawn, counted from 1.
        last: Last rank that is drawn.
        temperature: :math:`\tau`.
        share: Probability that an example has a hard negative.

    Raises:
        UserError: ``last`` is below ``first``.
    """

    def __init__(
        self,
        similarity: Comparing,
        first: Count = 26,
        last: Count = 100,
        temperature: Positive = 0.1,
        share: Share = 0.5,
    ) -> None:
        if last < first:
            raise UserError(f"hard_negatives.last={last} is below hard_negatives.first={first}")
        self.similarity, self.first, self.last, self.temperature = similarity, first, last, temperature
        self.share = share
        self._pool: Sequence[EditRequest] = ()
        self._near: dict[tuple[str, str | None, str], list[tuple[str, float]]] = {}

    def gather(self, requests: Sequence[EditRequest]) -> None:
        """Take the prompts of these requests, each once."""
        self._pool = list({(r.subject, r.target_old, r.prompt): r for r in requests}.values())
        self._read = [self.similarity.read(request.prompt) for request in self._pool]
        self._near = {}

    def neighbours(self, request: EditRequest) -> list[tuple[str, float]]:
        """Return the prompts of the ranks that are drawn from, each with its similarity, the closest first."""
        key = request.subject, request.target_old, request.prompt
        if key not in self._near:
            found = self.similarity.compare(self.similarity.read(request.prompt), self._read)
            order = sorted(range(len(found)), key=lambda i: (-found[i], i))
            others = [i for i in order if (self._pool[i].subject, self._pool[i].target_old) != key[:2]]
            ranked = others[self.first - 1 : self.last]
            self._near[key] = [(self._pool[i].pair().context, found[i]) for i in ranked]
        return self._near[key]

    def draw(self, request: EditRequest, rng: random.Random) -> str | None:
        """Return a prompt of another fact, or ``None`` by chance or if there are too few."""
        if rng.random() >= self.share or not (near := self.neighbours(request)):
            return None
        weights = [math.exp((close - near[0][1]) / self.temperature) for _, close in near]
        return rng.choices([prompt for prompt, _ in near], weights)[0]
