"""What a visitor of the playground can do, without its page."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from prune_lightning.data.protocol import superseded
from prune_lightning.editor import Editor
from prune_lightning.editor.history import Spectrum
from prune_lightning.editor.results import Refused, Scores
from prune_lightning.errors import UserError
from prune_lightning.types import EditRequest

LISTED = 200
"""Most edits that are listed with what the model says now: the latest ones."""
_ANSWER = 20
_SHORT = 6  # tokens of an answer that should stay


@dataclass(frozen=True)
class Place:
    """Where a visitor looks.

    Args:
        edits: How many edits the edited model holds, one of ``History.counts``; all by default.
        base: PRUNE's base; the editor's own by default.
    """

    edits: int | None = None
    base: float | None = None


@dataclass(frozen=True)
class Asked:
    """The answers of both models to a prompt."""

    prompt: str
    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether they differ."""
        return self.before != self.after


@dataclass(frozen=True)
class Written:
    """The outcome of a new edit.

    Args:
        request: The edit.
        number: Its number, from 1.
        refused: Why it was not written, or ``None``.
        probability: Of the new answer, before and after.
        scores: Scores of this edit before and after.
        seconds: Time of the edit.
    """

    request: EditRequest
    number: int
    refused: Refused | None
    probability: tuple[float, float]
    scores: Scores
    seconds: float


@dataclass(frozen=True)
class Listed:
    """An edit, and what the model says to its prompt.

    Args:
        number: Its number, from 1.
        request: The edit.
        now: The answer; empty if the edit is not in place where the visitor looks.
        holds: Whether the model gives the new answer; ``None`` if the edit is not in place.
        replaced: Whether a later edit in place gives its prompt another answer.
    """

    number: int
    request: EditRequest
    now: str
    holds: bool | None
    replaced: bool


class Playground:
    """An editor for visitors, one at a time.

    Args:
        editor: The editor.
    """

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._lock = threading.RLock()
        self._ended = False

    def end(self) -> None:
        """Wait for what a visitor has begun, and refuse everything after it."""
        with self._lock:
            self._ended = True

    @property
    def counts(self) -> list[int]:
        """How many edits each state holds."""
        return self.editor.history.counts

    def ask(self, prompt: str, place: Place) -> Asked:
        """Ask the unedited model, and the edited one at a place.

        Raises:
            UserError: The prompt is empty.
        """
        if not prompt.strip():
            raise UserError("write a prompt first")
        with self._alone(), self._at(place):
            (before,), (after,) = (self.editor.ask([prompt], _ANSWER, before=unedited) for unedited in (True, False))
        return Asked(prompt, before, after)

    def write(
        self, subject: str, prompt: str, target: str, paraphrases: Sequence[str] = (), unrelated: Sequence[str] = ()
    ) -> Written:
        """Write an edit after all others, and score it.

        Args:
            subject: What the fact is about.
            prompt: A prompt with the subject in it.
            target: The new answer.
            paraphrases: Other prompts that should give the new answer.
            unrelated: Prompts whose answers should stay those of the unedited model.

        Raises:
            UserError: The fact cannot be used; then nothing is written.
        """
        given = {"subject": subject.strip(), "prompt": prompt.strip(), "target_new": target.strip()}
        names = ("subject", "prompt", "new answer")
        if empty := [name for name, text in zip(names, given.values(), strict=True) if not text]:
            raise UserError(f"an edit needs a subject, a prompt and a new answer: the {empty[0]} is empty")
        if given["subject"] not in given["prompt"]:
            raise UserError(f"the prompt has to contain the subject {given['subject']!r} as it is written")
        with self._alone():
            editor = self.editor
            prompts, probes = _lines(paraphrases), _lines(unrelated)
            answers = editor.ask(probes, _SHORT, before=True) if probes else []
            locality = [{"prompt": p, "answer": a} for p, a in zip(probes, answers, strict=True) if a]
            outcome = editor.edit({**given, "paraphrases": prompts, "locality": locality})
            number = len(editor)
            request = editor.edits[-1]
            before, after = (editor.probability(request.prompt, request.target_new, old) for old in (True, False))
            refused = next(iter(outcome.refused), None)
            return Written(request, number, refused, (before, after), editor.report(edits=[number]), outcome.seconds)

    def undo(self, number: int | None = None) -> EditRequest:
        """Take back an edit; the last one by default.

        Raises:
            UserError: There is no such edit.
        """
        with self._alone():
            if not len(self.editor):
                raise UserError("there are no edits to take back")
            (taken,) = self.editor.undo(edits=[len(self.editor) if number is None else number])
            return taken

    def listing(self, place: Place) -> list[Listed]:
        """Return the latest edits, newest first, with what the model says now."""
        with self._alone(), self._at(place):
            edits = list(self.editor.edits)
            count = len(edits) if place.edits is None else place.edits
            shown = range(max(0, len(edits) - LISTED), len(edits))
            held = [index for index in shown if index < count]
            said = self.editor.ask([edits[index].prompt for index in held], _ANSWER) if held else []
            answers = dict(zip(held, said, strict=True))
            holds = dict(zip(held, self.editor.holds([index + 1 for index in held]) if held else [], strict=True))
            replaced = superseded(edits[:count], range(1, count + 1))
            return [
                Listed(
                    index + 1,
                    edits[index],
                    answers.get(index, ""),
                    holds.get(index),
                    index in replaced,
                )
                for index in reversed(shown)
            ]

    def spectra(self, place: Place) -> list[Spectrum]:
        """Return the spectrum of each edited matrix at a place."""
        with self._alone(), self.editor.history.at(place.edits):
            return self.editor.history.spectra(place.base)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            if self._ended:
                raise UserError("the playground has ended")
            yield

    def _at(self, place: Place) -> AbstractContextManager[None]:
        return self.editor.history.at(place.edits, place.base)


def _lines(texts: Sequence[str]) -> list[str]:
    return [text.strip() for text in texts if text.strip()]
