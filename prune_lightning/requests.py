"""Edit requests: the fact to rewrite, and the prompts that test the rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prune_lightning.errors import UserError, shown
from prune_lightning.text.separators import AUTO, TextPair, join, trimmed
from prune_lightning.text.subjects import locate

Frame = tuple[str, str]
"""The text of a chat template before and after a user's turn."""
PLAIN: Frame = ("", "")


def _framed(prompt: str, frame: Frame) -> str:
    return frame[0] + prompt.rstrip() + frame[1] if any(frame) else prompt


@dataclass(frozen=True)
class Probe:
    """A prompt whose ``answer`` the edit must not change (or, for portability, must imply).

    Args:
        prompt: Text up to the answer; whitespace at its end is part of it.
        answer: The expected continuation; ``None`` to test only that the output does not change.
        kind: What the probe tests, e.g. ``neighborhood`` or ``unrelated``.
        aliases: Further correct answers for free generation.
        separator: The text between prompt and answer, see :func:`~prune_lightning.text.separators.join`.
        frame: See :class:`EditRequest`.
    """

    prompt: str
    answer: str | None = None
    kind: str = "neighborhood"
    aliases: tuple[str, ...] = ()
    separator: str = AUTO
    frame: Frame = PLAIN

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str) and isinstance(self.answer, str):
            object.__setattr__(self, "prompt", trimmed(self.prompt, self.answer, self.separator))

    def pair(self, answer: str | None = None) -> TextPair:
        """Return the prompt with its answer, or with another one, as literal text.

        Args:
            answer: An answer in place of the probe's own.
        """
        return join(_framed(self.prompt, self.frame), answer or self.answer or "", self.separator)


@dataclass(frozen=True)
class EditRequest:
    """One fact to rewrite, with the prompts that test the rewrite.

    Args:
        case_id: Identifier of the record in its source.
        subject: The entity, a literal part of ``prompt``; blanks at its ends are dropped.
        prompt: Text up to the target; whitespace at its end is part of it.
        target_new: The new answer.
        target_old: The old answer, if known; comparison scores need it.
        paraphrases: Other prompts that should yield ``target_new``.
        locality: Probes that should not change.
        portability: Consequences of the edit, if the record has them.
        generation_prompts: Beginnings of texts about the subject; the fluency of their continuations is scored.
        references: Texts about the new target, with which these continuations should be consistent.
        subject_start: Index in ``prompt`` of the subject's first character; ``None`` to find it, see
            :func:`~prune_lightning.text.subjects.locate`.
        separator: The text between a prompt of this record and its target, see
            :func:`~prune_lightning.text.separators.join`. Probes have their own.
        frame: The text of a chat template before and after each prompt.

    Raises:
        UserError: An empty prompt or target, or a subject that is not in its prompt.
    """

    case_id: int | str
    subject: str
    prompt: str
    target_new: str
    target_old: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = field(default=(), repr=False)
    generation_prompts: tuple[str, ...] = field(default=(), repr=False)
    references: tuple[str, ...] = field(default=(), repr=False)
    subject_start: int | None = None
    separator: str = AUTO
    frame: Frame = PLAIN

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"`{name}` is expected to be a non-empty text, but got {shown(value)}")
        if isinstance(self.case_id, bool) or not isinstance(self.case_id, (int, str)):
            raise UserError(f"`case_id` is expected to be a whole number or a text, but got {shown(self.case_id)}")
        answers = (self.target_old, *(probe.answer for probe in (*self.locality, *self.portability)))
        if not all(text is None or (isinstance(text, str) and text.strip()) for text in answers):
            raise UserError("the old target and the answers of probes are expected to be non-empty texts, or absent")
        for name, text in self._texts():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"`{name}` is expected to be a non-empty text, but got {shown(text)}")
        self._place_subject()
        object.__setattr__(self, "prompt", trimmed(self.prompt, self.target_new, self.separator))

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Yield the texts besides the edit's own, with their names."""
        for name in ("paraphrases", "generation_prompts", "references"):
            for place, text in enumerate(getattr(self, name)):
                yield f"{name}[{place}]", text
        for name in ("locality", "portability"):
            for place, probe in enumerate(getattr(self, name)):
                yield f"{name}[{place}].prompt", probe.prompt

    def _place_subject(self) -> None:
        subject, start = self.subject.strip(), self.subject_start
        if start is None:
            start = locate(subject, self.prompt).start
        elif isinstance(start, bool) or not isinstance(start, int):
            raise UserError(f"`subject_start` is expected to be a whole number, but got {shown(start)}")
        else:
            start += self.subject.index(subject)
        if start < 0 or not self.prompt.startswith(subject, start):
            found = self.prompt[max(start, 0) : max(start, 0) + len(subject)]
            raise UserError(
                f"the subject {shown(subject)} is not at character {start} of its prompt, there is {shown(found)}"
            )
        object.__setattr__(self, "subject", subject)
        object.__setattr__(self, "subject_start", start)

    @property
    def fact(self) -> tuple[str, str]:
        """Prompt and new target, without blanks between them: what tells one edit from another."""
        return self.prompt.rstrip(), self.target_new

    @property
    def subject_end(self) -> int:
        """Index in ``prompt`` of the first character after the subject."""
        assert self.subject_start is not None  # set in `__post_init__`
        return self.subject_start + len(self.subject)

    def pair(self, target: str | None = None) -> TextPair:
        """Return the prompt with the new target, or with another one, as literal text."""
        return join(_framed(self.prompt, self.frame), target or self.target_new, self.separator)

    def paraphrase_pairs(self, target: str | None = None) -> list[TextPair]:
        """Return the paraphrases with the new target, or with another one, as literal text."""
        prompts = [_framed(prompt, self.frame) for prompt in self.paraphrases]
        return [join(prompt, target or self.target_new, self.separator) for prompt in prompts]

    def behind(self, prefix: str, start: int = 0) -> tuple[TextPair, int]:
        """Return the prompt and its target after a prefix, and the index of the first character after the subject.

        In a chat the prefix begins the user's turn.

        Args:
            prefix: Text to insert.
            start: Position in the prompt at which to insert it, e.g. after a literal start token.
        """
        pair, head = self.pair(), len(self.frame[0])
        at = head + start
        context = pair.context[:at] + prefix + pair.context[at:]
        return TextPair(context, pair.continuation), head + len(prefix) + self.subject_end

    def with_separator(self, separator: str) -> EditRequest:
        """Return the request with a separator for all its texts that have none."""

        def of(own: str) -> str:
            return separator if own == AUTO else own

        locality, portability = (
            tuple(replace(probe, separator=of(probe.separator)) for probe in probes)
            for probes in (self.locality, self.portability)
        )
        return replace(self, separator=of(self.separator), locality=locality, portability=portability)

    def in_frame(self, frame: Frame) -> EditRequest:
        """Return the request with its prompts, paraphrases and probes as turns of a chat."""
        locality, portability = (
            tuple(replace(probe, frame=frame) for probe in probes) for probes in (self.locality, self.portability)
        )
        return replace(self, frame=frame, locality=locality, portability=portability)

    def as_dict(self) -> dict[str, Any]:
        """Return the request as plain, JSON-serializable data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> EditRequest:
        """Return a request from the values of :meth:`as_dict`, also after a round trip through JSON."""
        lists = ("paraphrases", "generation_prompts", "references")
        probes = {name: tuple(_probe(probe) for probe in plain[name]) for name in ("locality", "portability")}
        frame = tuple(plain.get("frame", PLAIN))
        return cls(**{**plain, **{name: tuple(plain[name]) for name in lists}, **probes, "frame": frame})


def _probe(plain: Mapping[str, Any]) -> Probe:
    return Probe(**{**plain, "aliases": tuple(plain["aliases"]), "frame": tuple(plain.get("frame", PLAIN))})
