"""Questions to the edited and to the unedited model of an editor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

from prune_lightning.editor.evaluation import scores_of
from prune_lightning.editor.results import Answers, Scores
from prune_lightning.editor.session import EditSession
from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.text.separators import join


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
            max_new_tokens: Longest answer, in tokens.
            before: Ask the unedited model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        session = self._open()
        head, tail = session.frame()
        tokens = session.language_model.tokens
        ids = tokens.encode_all([f"{head}{text}{tail}" for text in prompts])
        with session.view(edited=not before):
            found = decode(session.language_model, ids, [max_new_tokens] * len(ids))
        answers = [answer.text.strip() for answer in found]
        return answers[0] if isinstance(prompt, str) else answers

    def compare(self, prompts: str | Sequence[str] | None = None, max_new_tokens: int = 20) -> Answers:
        """Ask the unedited and the edited model the same.

        Args:
            prompts: The prompts; those of the edits by default.
            max_new_tokens: Longest answer, in tokens.
        """
        asked = [request.prompt for request in self._open().requests] if prompts is None else prompts
        asked = [asked] if isinstance(asked, str) else list(asked)
        before, after = (self.ask(asked, max_new_tokens, before=unedited) for unedited in (True, False))
        return Answers(asked, before, after)

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

    def report(self, edits: Sequence[int] = ()) -> Scores:
        """Score edits in place: efficacy, generalization to paraphrases, and locality, where the facts have them.

        Args:
            edits: Numbers of the edits, from 1; all by default.

        Raises:
            UserError: There are no edits, or no such edit.
        """
        session = self._open()
        if not session.requests:
            raise UserError("there are no edits to report on: call edit() first")
        requests = session.numbered(edits) if edits else list(session.requests)
        return scores_of(session, requests, self.compare([request.prompt for request in requests]))
