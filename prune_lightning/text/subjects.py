"""Finds the subject in its prompt."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from prune_lightning.errors import UserError, shown
from prune_lightning.text.scripts import is_hangul, is_mark, is_unspaced, is_word

_HYPHENS = "-‐‑"


@dataclass(frozen=True)
class Place:
    """The position of a subject.

    Args:
        start: Index of its first character in the prompt.
        doubt: Why another position may be meant, or ``None``.
    """

    start: int
    doubt: str | None = None


def locate(subject: str, prompt: str) -> Place:
    """Return the first occurrence of a subject as a separate word.

    The order of preference is: whole words; parts of a hyphenated word; the beginning of a longer word, as in languages
    with inflections; any other position. In scripts without blanks between words every occurrence counts as a whole
    word.

    Raises:
        UserError: The prompt does not contain the subject, or only inside several longer words.

    >>> locate("Al", "Also in 1990 Al moved to").start
    13
    >>> locate("东京", "日本的首都东京位于").start
    5
    """
    starts = _occurrences(subject, prompt)
    if not starts:
        raise UserError(f"the subject {shown(subject)} is not in its prompt {shown(prompt)}{_hint(subject, prompt)}")
    ranks = {start: _rank(subject, prompt, start) for start in starts}
    best = min(ranks.values())
    chosen = [start for start in starts if ranks[start] == best]
    if best >= 2:
        word = _word_around(prompt, chosen[0], chosen[0] + len(subject))
        if len(chosen) > 1:
            raise UserError(
                f"the subject {shown(subject)} is found only inside words of its prompt, {shown(word)} and others; "
                "set `subject_start` to choose one"
            )
        return Place(chosen[0], f"the subject {shown(subject)} is found only inside the word {shown(word)}")
    if len(chosen) > 1:
        return Place(
            chosen[0],
            f"the subject {shown(subject)} stands {len(chosen)} times in its prompt; the first, at character "
            f"{chosen[0]}, is taken (`subject_start` chooses another)",
        )
    return Place(chosen[0])


def _occurrences(subject: str, prompt: str) -> list[int]:
    found, start = [], prompt.find(subject)
    while start >= 0:
        found.append(start)
        start = prompt.find(subject, start + 1)
    return found


def _rank(subject: str, prompt: str, start: int) -> int:
    end = start + len(subject)
    left = start > 0 and _joined(prompt[start - 1], subject[0])
    right = end < len(prompt) and _joined(subject[-1], prompt[end])
    right = right and not (is_hangul(subject[-1]) and is_hangul(prompt[end]))  # a particle
    if left:
        return 3
    if right:
        return 3 if is_mark(prompt[end]) else 2
    hyphens = start > 1 and prompt[start - 1] in _HYPHENS and is_word(prompt[start - 2])
    hyphens |= end + 1 < len(prompt) and prompt[end] in _HYPHENS and is_word(prompt[end + 1])
    return int(hyphens)


def _joined(before: str, after: str) -> bool:
    """Whether two adjacent characters belong to the same word."""
    if is_mark(after):
        return True
    return is_word(before) and is_word(after) and not (is_unspaced(before) or is_unspaced(after))


def _word_around(prompt: str, start: int, end: int) -> str:
    while start > 0 and is_word(prompt[start - 1]):
        start -= 1
    while end < len(prompt) and is_word(prompt[end]):
        end += 1
    return prompt[start:end]


def _hint(subject: str, prompt: str) -> str:
    """Return a hint about an occurrence with different case or in another Unicode form."""
    at = prompt.lower().find(subject.lower())
    if at >= 0 and len(prompt.lower()) == len(prompt):
        return f"; there it is written {shown(prompt[at : at + len(subject)])}"
    if unicodedata.normalize("NFKC", subject) in unicodedata.normalize("NFKC", prompt):
        return "; the two are in different Unicode forms of the same text"
    return ""
