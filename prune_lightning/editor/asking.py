"""Questions to the edited and to the unedited model of an editor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

from lightning.pytorch.utilities import rank_zero_warn

from prune_lightning.editor.evaluation import scores_of
from prune_lightning.editor.results import Answers, Scores
from prune_lightning.editor.session import EditSession, as_numbers
from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.text.separators import join
from prune_lightning.types import EditRequest


class Asking(ABC):
    """Asks a model that is under edit."""

    @abstractmethod
    def _open(self) -> EditSession:
        """Return the session, unless it is closed."""

    @overload
    def ask(self, prompt: str, max_new_tokens: int = 20, before: bool = False) -> str: ...  # type: ignore[overload-overlap]

    @overload
    def ask(self, prompt: Sequence[str], max_new_tokens: int = 20, before: bool = False) -> list[str]: ...

    def ask(self, prompt: str | Sequence[str], max_new_tokens: int = 20, before: bool = False) -> str | list[str]:
        """Return the model's greedy continuation of a prompt, or of several.

        Args:
            prompt: One prompt or several.
            max_new_tokens: Longest answer, in tokens. A prompt that leaves no room for it loses its first tokens.
            before: Ask the unedited model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        session = self._open()
        head, tail = session.frame()
        tokens = session.language_model.tokens
        ids = tokens.encode_all([f"{head}{text}{tail}" for text in prompts])
        room = tokens.max_length - max_new_tokens
        if 0 < room < (longest := max(map(len, ids), default=0)):
            rank_zero_warn(
                f"a prompt of {longest} tokens is cut to its last {room}: the model's context is {tokens.max_length}, "
                f"and the answer may take {max_new_tokens}"
            )
        with session.view(edited=not before):
            found = decode(session.language_model, ids, [max_new_tokens] * len(ids))
        answers = [answer.text.strip() for answer in found]
        return answers[0] if isinstance(prompt, str) else answers

    def compare(
        self, prompts: str | Sequence[str] | None = None, max_new_tokens: int = 20, *, edits: int | Sequence[int] = ()
    ) -> Answers:
        """Ask the unedited and the edited model the same.

        Args:
            prompts: The prompts; those of the edits by default, with the new answers and whether they hold.
            max_new_tokens: Longest answer, in tokens.
            edits: Number of the edit to ask for, or numbers of several, from 1; all by default.

        Raises:
            UserError: There are no edits, or no such edit, or both prompts and edits are given.
        """
        if prompts is None:
            requests = self._chosen(edits)
            if not requests:
                raise UserError("there are no edits to compare: write some first, or give prompts")
            asked, wanted, held = [request.prompt for request in requests], _targets(requests), self.holds(edits)
        elif as_numbers(edits):
            raise UserError("give either prompts or numbers of edits to compare")
        else:
            asked, wanted, held = [prompts] if isinstance(prompts, str) else list(prompts), [], []
        before, after = (self.ask(asked, max_new_tokens, before=unedited) for unedited in (True, False))
        return Answers(asked, before, after, wanted, held)

    def holds(self, edits: int | Sequence[int] = ()) -> list[bool]:
        """Return whether each edit holds: every token of its new answer is the model's first choice.

        Args:
            edits: Number of the edit, or numbers of several, from 1; all by default.

        Raises:
            UserError: There is no such edit.
        """
        requests = self._chosen(edits)
        pairs = [request.pair() for request in requests]
        return score_pairs(self._open().language_model, pairs).hit.tolist() if pairs else []

    def _chosen(self, edits: int | Sequence[int]) -> list[EditRequest]:
        """Return edits by their numbers; all without any."""
        session = self._open()
        return session.numbered(edits) if as_numbers(edits) else list(session.requests)

    def probability(self, prompt: str, answer: str, before: bool = False) -> float:
        """Return the probability that the model continues a prompt with an answer.

        Args:
            prompt: The prompt.
            answer: The answer; the blank before it is found as for a fact.
            before: Ask the unedited model.
        """
        session = self._open()
        head, tail = session.frame()
        pair = join(f"{head}{prompt}{tail}", answer)
        with session.view(edited=not before):
            scores = score_pairs(session.language_model, [pair])
        return math.exp(-float(scores.nll[0] * scores.num_tokens[0]))

    def report(self, edits: int | Sequence[int] = ()) -> Scores:
        """Score edits in place: efficacy, generalization to paraphrases, and locality, where the facts have them.

        Args:
            edits: Number of the edit, or numbers of several, from 1; all by default.

        Raises:
            UserError: There are no edits, or no such edit.
        """
        session = self._open()
        if not session.requests:
            raise UserError("there are no edits to report on: write some first")
        return scores_of(session, self._chosen(edits), self.compare(edits=edits))


def _targets(requests: Sequence[EditRequest]) -> list[str]:
    return [request.target_new for request in requests]
