"""Typed access to the fields of a record, with errors that name key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_lightning.errors import UserError, shown
from prune_lightning.text.subjects import locate


class Fields:
    """The fields of one JSON object.

    Args:
        row: The object.
        path: Its path in the record, for messages, e.g. ``locality[0].``.
        notes: List that collects remarks about the record; shared with the objects inside it.
    """

    def __init__(self, row: Mapping[str, Any], path: str = "", notes: list[str] | None = None) -> None:
        self.row, self.path = row, path
        self.notes: list[str] = [] if notes is None else notes

    def __contains__(self, key: str) -> bool:
        """Whether a field exists and is not null."""
        return self.row.get(key) is not None

    def wrong(self, key: str, expected: str, value: Any) -> UserError:
        """Return the error for a field of the wrong type."""
        return UserError(f"`{self.path}{key}` is expected to be {expected}, but got {shown(value)}")

    def _present(self, key: str) -> Any:
        if key not in self.row:
            raise UserError(f"the key '{self.path}{key}' is missing")
        return self.row[key]

    def text(self, key: str) -> str:
        """Return a required text, unchanged."""
        value = self._present(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text", value)
        return value

    def optional(self, key: str) -> str | None:
        """Return a text, or ``None`` if it is missing or empty."""
        return (self.text(key) or None) if key in self else None

    def stripped(self, key: str) -> str:
        """Return a required text without whitespace at its ends; dropped whitespace gives a remark."""
        return self._without_blanks(key, self.text(key))

    def target(self, key: str) -> str:
        """Return a target without whitespace at its end; a blank at its beginning is handled as a separator."""
        text = self.text(key)
        return self._without_blanks(key, text, text.lstrip(" ").rstrip())

    def optional_target(self, key: str) -> str | None:
        """Return a target, or ``None`` if it is missing or empty."""
        return self.target(key) if self.optional(key) else None

    def _without_blanks(self, key: str, text: str, kept: str | None = None) -> str:
        kept = text.strip() if kept is None else kept
        if text and not kept:
            raise self.wrong(key, "a non-empty text", text)
        if kept != text and kept:
            self.notes.append(f"`{self.path}{key}` {shown(text)} has whitespace at its ends, which is dropped")
        return kept

    def items(self, key: str) -> list[Any]:
        """Return a list, empty if it is missing; a text is an error."""
        value = self.row.get(key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        return value or []

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        found = self.items(key)
        for place, value in enumerate(found):
            if not isinstance(value, str):
                raise self.wrong(f"{key}[{place}]", "a text", value)
        return tuple(found)

    def prompts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, none of them empty."""
        found = self.texts(key)
        for place, text in enumerate(found):
            if not text.strip():
                raise self.wrong(f"{key}[{place}]", "a non-empty text", text)
        return found

    def object(self, key: str) -> Fields:
        """Return a required object."""
        value = self._present(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return Fields(value, f"{self.path}{key}.", self.notes)

    def objects(self, key: str) -> list[Fields]:
        """Return a list of objects, empty if it is missing."""
        found = []
        for place, value in enumerate(self.items(key)):
            if not isinstance(value, dict):
                raise self.wrong(f"{key}[{place}]", "an object with a `prompt`", value)
            found.append(Fields(value, f"{self.path}{key}[{place}].", self.notes))
        return found

    def place(self, subject: str, prompt: str) -> int | None:
        """Return the position of a subject in a prompt; an ambiguous position gives a remark.

        Raises:
            UserError: See :func:`~prune_lightning.text.subjects.locate`.
        """
        if not subject:
            return None  # the request raises the error
        found = locate(subject, prompt)
        if found.doubt:
            self.notes.append(found.doubt)
        return found.start

    def answers(self, key: str) -> list[str]:
        """Return the non-empty answers of a field that holds a text or nested lists of texts.

        Raises:
            UserError: The field holds something else.
        """
        return [text.strip() for text in self._flat(key, self.row.get(key)) if text.strip()]

    def _flat(self, key: str, value: Any) -> list[str]:
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise self.wrong(key, "a text or a list of texts", value)
        found: list[str] = []
        waiting = [(f"{key}[{place}]", part) for place, part in enumerate(value)]
        while waiting:  # no recursion, since a file can nest lists to any depth
            name, part = waiting.pop(0)
            if isinstance(part, list):
                waiting = [(f"{name}[{place}]", inner) for place, inner in enumerate(part)] + waiting
            elif isinstance(part, str):
                found.append(part)
            else:
                raise self.wrong(name, "a text", part)
        return found
