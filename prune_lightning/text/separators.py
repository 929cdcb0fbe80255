"""The separator between a prompt and its target, and the split of their text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TypeAlias

from prune_lightning.errors import UserError
from prune_lightning.text.scripts import is_unspaced, mostly_unspaced

AUTO = "auto"
NAMED = {"blank": " ", "none": ""}

_CONTROL_TOKEN = re.compile(r"(<[|｜][^<>]*[|｜]>|<[A-Za-z][^<>]*>)$")  # <|assistant|>, <s>, <b>; </b> closes
_GLUED = frozenset("@\\^/")
_HYPHENS = frozenset("-‐‑–—=")
_PAIRED = frozenset('"`*_')  # marks that both open and close
_PARTNERS = {"“": "„", "‘": "‚", "«": "»", "»": "«", "‹": "›", "›": "‹"}
_CLOSING_TARGET = re.compile(r"[,;:!?%]|\.(\s|$)|['’]s\b")


@dataclass(frozen=True)
class TextPair:
    """A prompt with its target as literal text, split where the target's tokens begin.

    Args:
        context: The text before the target.
        continuation: The text to predict: the target, including a blank directly before it, since tokenizers merge a
            blank with the following word.
    """

    context: str
    continuation: str

    @property
    def text(self) -> str:
        """The whole text."""
        return self.context + self.continuation


Pair: TypeAlias = TextPair | tuple[str, str]
"""Literal text, or a prompt and its target with an inferred separator."""


@dataclass(frozen=True)
class Inferred:
    """An inferred separator, and why it may be wrong.

    Args:
        separator: A blank or nothing.
        doubt: The reason for doubt, or ``None``.
    """

    separator: str
    doubt: str | None = None


def checked_separator(name: str, value: object) -> str:
    """Check and return a separator.

    Raises:
        UserError: It is not a text.
    """
    if not isinstance(value, str):
        raise UserError(f"`{name}` is expected to be auto, blank, none or a literal text, but got {value!r}")
    return value


def join(prompt: str, target: str, separator: str = AUTO) -> TextPair:
    """Join a prompt and its target.

    Args:
        prompt: Text before the target; blanks and line breaks at its end are part of it.
        target: The continuation; empty to return only the text before it. Blanks at its end are dropped.
        separator: The text between them: ``auto`` (see :func:`infer`), ``blank``, ``none``, or a literal text.

    >>> join("The capital of France is", "Lyon")
    TextPair(context='The capital of France is', continuation=' Lyon')
    >>> join("The capital of France is ", "Lyon")
    TextPair(context='The capital of France is', continuation=' Lyon')
    >>> join("法国的首都是", "里昂")
    TextPair(context='法国的首都是', continuation='里昂')
    >>> join("Capital?", "Lyon", " A: ")
    TextPair(context='Capital? A:', continuation=' Lyon')
    """
    between = infer(prompt, target).separator if separator == AUTO else NAMED.get(separator, separator)
    word = target.strip()
    leading = target[: len(target) - len(target.lstrip())] if word else ""
    before = prompt + between
    if not (before.endswith(" ") and leading == " "):
        before += leading
    if before.endswith(" "):
        return TextPair(before[:-1], " " + word if word else "")
    return TextPair(before, word)


def trimmed(prompt: str, target: str, separator: str = AUTO) -> str:
    """Return a prompt without a single blank at its end, if the text of the pair is the same without it."""
    shorter = prompt[:-1]
    same = prompt.endswith(" ") and join(shorter, target, separator) == join(prompt, target, separator)
    return shorter if same else prompt


def as_pair(pair: Pair) -> TextPair:
    """Return a pair as literal text."""
    return pair if isinstance(pair, TextPair) else join(*pair)


def infer(prompt: str, target: str) -> Inferred:
    """Infer the separator between a prompt and its target by the first rule that applies.

    1. Nothing, if the prompt ends or the target begins with whitespace, which is taken literally.
    2. Nothing, after a control token, an opening tag, bracket or quotation mark, a currency sign before its amount, ``#
    @ / -`` and similar characters that attach to the next word.
    3. Nothing, before a target that begins with closing punctuation.
    4. Nothing, if both sides are in a script without blanks between words. If only one side is, the script of most of
    the prompt's letters decides.
    5. A blank otherwise.
    """
    if target[:1].isspace() or prompt[-1:].isspace():
        return Inferred("", _whitespace_doubt(prompt, target))
    if not prompt or _opens(prompt):
        return Inferred("", _quote_doubt(prompt))
    if target and (_CLOSING_TARGET.match(target) or unicodedata.category(target[0]) == "Pe"):
        return Inferred("", "the target begins with closing punctuation, so no blank is put before it")
    last = next((char for char in reversed(prompt) if char.isalpha()), prompt[-1])
    left = is_unspaced(last) or is_unspaced(prompt[-1])
    right = is_unspaced(next((char for char in target if char.isalnum()), target[0])) if target else left
    if left == right:
        return Inferred("" if left else " ")
    separator = "" if mostly_unspaced(prompt) else " "
    digits = target[:1].isdigit() and left
    what = "nothing" if separator == "" else "a blank"
    doubt = f"one side is in a script without blanks and the other is not; {what} is put between them"
    return Inferred(separator, None if digits else doubt)


def _whitespace_doubt(prompt: str, target: str) -> str | None:
    if prompt[-1:].isspace() and target[:1].isspace():
        return "the prompt ends and the target begins with whitespace"
    ending = prompt[len(prompt.rstrip()) :]
    if ending and ending != " " and not ending.endswith("\n"):
        return f"the prompt ends in {ending!r}, which is taken literally"
    return None


def _quote_doubt(prompt: str) -> str | None:
    if prompt and prompt[-1] in _PAIRED and not _unpaired(prompt):
        return f"the {prompt[-1]} at the end of the prompt may close an earlier one; nothing is put behind it"
    return None


def _unpaired(prompt: str) -> bool:
    """Whether the mark at the end of a prompt occurs an odd number of times."""
    return len(re.findall(f"{re.escape(prompt[-1])}+", prompt)) % 2 == 1


def _stands_free(prompt: str) -> bool:
    """Whether there is whitespace before the mark at the end of a prompt, as before one that opens."""
    before = prompt.rstrip(prompt[-1])
    return bool(before) and before[-1].isspace()


def _opens(prompt: str) -> bool:
    """Whether the end of a prompt attaches to the next word."""
    last, before = prompt[-1], prompt[:-1]
    category = unicodedata.category(last)
    if _CONTROL_TOKEN.search(prompt) or category == "Ps" or last in _GLUED or last in "¿¡":
        return True
    if last in _PARTNERS:  # „a“ and »a« close with a mark that opens in other languages
        return before.count(_PARTNERS[last]) <= before.count(last)
    if last in _PAIRED:
        return _unpaired(prompt) or _stands_free(prompt)
    free = not before or before[-1].isspace() or unicodedata.category(before[-1]) in ("Ps", "Pi")
    if last in _HYPHENS:
        return not free
    if last in "'#~”’":
        return free
    return category == "Sc" and not before.rstrip()[-1:].isdigit()
