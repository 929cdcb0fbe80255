"""Streams that are read from a JSON or JSONL file: lines are kept, so that a bad record can be found."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_lightning.data.stream import BadRow, EditStream
from prune_lightning.errors import UserError, near
from prune_lightning.types import EditRequest


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield ``(line, record)`` of a JSON array or a JSONL file; a text in place of the record says what is wrong.

    Args:
        path: The file, UTF-8, with or without a byte-order mark.

    Raises:
        UserError: There is no such file (the message names near matches), or it cannot be read as UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if text is None:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f"; {near(path.name, siblings)}" if siblings else f"; there is no folder {str(path.parent)!r} either"
        raise UserError(f"no file {str(path)!r}{hint}")
    yield from _array(text) if text.lstrip().startswith("[") else _lines(text)


def _checked(line: int, record: Any) -> tuple[int, dict[str, Any] | str]:
    return line, record if isinstance(record, dict) else f"expected an object, but got {type(record).__name__}"


def _lines(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # nothing else ends a line in JSONL
        if line.strip():
            try:
                yield _checked(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON: {error}"


def _array(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position >= len(text):
            yield line, "the array is not closed: the file is cut off"
            return
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON, and nothing after it can be read: {error}"
            return
        yield _checked(line, record)


def listed(row: dict[str, Any], key: str) -> list[Any]:
    """Return a key's list; nothing where the record has none.

    Raises:
        UserError: It is something else; a text would be taken for the list of its letters.
    """
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise UserError(f"`{key}` is expected to be a list, but got {value!r}")
    return value or []


def _encodable(request: EditRequest) -> EditRequest:
    """Refuse what JSON can escape and no file or tokenizer can hold: half of a surrogate pair."""
    try:
        json.dumps(request.as_dict(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a text holds half of a surrogate pair: {error}") from error
    return request


class FileStream(EditStream):
    """Base of the file readers; a format implements :meth:`parse`.

    Args:
        path: JSON array or JSONL file.
        kwargs: See :class:`~prune_lightning.data.stream.EditStream`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        try:
            self.path = Path(path).expanduser()
        except RuntimeError as error:
            raise UserError(f"data.path={path!r}: {error}") from error

    @abstractmethod
    def parse(self, row: dict[str, Any], case_id: int) -> EditRequest:
        """Turn one record into a request.

        Args:
            row: The record.
            case_id: Its number in the file, for records that have no id of their own.

        Raises:
            KeyError, TypeError, UserError: The record cannot be used.
        """

    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield requests and bad rows in the file's order."""
        for case_id, (line, row) in enumerate(read_objects(self.path)):
            if isinstance(row, str):
                yield BadRow(line, row)
                continue
            try:
                yield _encodable(self.parse(row, case_id))
            except KeyError as error:
                yield BadRow(line, f"the key {error} is missing")
            except (UserError, TypeError, AttributeError, IndexError) as error:
                yield BadRow(line, str(error))
