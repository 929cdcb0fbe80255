"""Classes of characters: scripts without blanks between words, and characters of words."""

from __future__ import annotations

import unicodedata

_UNSPACED_NAMES = (
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE "),
    *("TAI LE ", "NEW TAI LUE ", "TAI THAM ", "TAI VIET ", "HALFWIDTH KATAKANA", "HALFWIDTH IDEOGRAPHIC"),
)


def is_unspaced(char: str) -> bool:
    """Whether a character belongs to a script without blanks between words, such as Chinese, Japanese or Thai.

    Wide and full-width letters, digits and punctuation count, but not Korean, which has blanks.

    >>> [is_unspaced(char) for char in "京の。ไaé한"]
    [True, True, True, True, False, False, False]
    """
    if unicodedata.east_asian_width(char) in "WF":
        return unicodedata.category(char)[0] in "LMNP" and not is_hangul(char)
    return unicodedata.name(char, "").startswith(_UNSPACED_NAMES)


def is_hangul(char: str) -> bool:
    """Whether a character is Korean, in which particles follow a word without a blank."""
    return unicodedata.name(char, "").startswith("HANGUL")


def is_mark(char: str) -> bool:
    """Whether a character combines with the one before it."""
    return unicodedata.category(char)[0] == "M"


def is_word(char: str) -> bool:
    """Whether a character can be part of a word."""
    return char.isalnum() or char == "_" or is_mark(char)


def mostly_unspaced(text: str) -> bool:
    """Whether most letters of a text belong to scripts without blanks."""
    letters = [is_unspaced(char) for char in text if char.isalpha()]
    return 2 * sum(letters) > len(letters)
