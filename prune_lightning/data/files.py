"""Streams that are read from a JSON or JSONL file: lines are kept, so that a bad record can be found."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_lightning.data.stream import BadRow, EditStream
from prune_lightning.errors import UserError
from prune_lightning.records import read_objects
from prune_lightning.types import EditRequest


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
