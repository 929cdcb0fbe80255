"""Streams from a JSON or JSONL file, with line numbers for messages about bad records."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_lightning.data.fields import Fields
from prune_lightning.data.rows import BadRow, Located
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.records import read_objects
from prune_lightning.types import EditRequest


def _encodable(request: EditRequest) -> EditRequest:
    """Refuse half of a surrogate pair, which JSON can escape but no file or tokenizer can encode."""
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
    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into a request.

        Args:
            row: The record.
            case_id: Its number in the file, for records without an id.

        Raises:
            UserError: The record cannot be used.
        """

    def located(self) -> Iterator[Located | BadRow]:
        """Yield requests and bad rows in the file's order, with their lines and remarks."""
        for case_id, (line, row) in enumerate(read_objects(self.path)):
            if isinstance(row, str):
                yield BadRow(line, row)
                continue
            fields = Fields(row)
            try:
                request = _encodable(self.parse(fields, case_id))
            except (UserError, RecursionError) as error:
                yield BadRow(line, str(error))
                continue
            yield Located(request, line, tuple(fields.notes))

    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield requests and bad rows in the file's order."""
        for found in self.located():
            yield found if isinstance(found, BadRow) else found.request
