"""Streams from a file or a data set on the hub, with line numbers for messages about bad records."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_lightning.data.fields import Fields
from prune_lightning.data.hub import PREFIX, hub_rows
from prune_lightning.data.rows import BadRow, Located
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.records import Row, read_objects
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
        path: JSON array or JSONL file, or ``hub://OWNER/NAME`` for a data set on the Hugging Face hub.
        hub: What to load of a data set on the hub, see :func:`~prune_lightning.data.hub.hub_rows`.
        kwargs: See :class:`~prune_lightning.data.stream.EditStream`.
    """

    def __init__(self, path: str, hub: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._source, self.hub = path, dict(hub or {})
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

    def read_file(self) -> Iterator[Row]:
        """Yield the records of the file; a format that is not JSON overrides this."""
        yield from read_objects(self.path)

    def parse_all(self, row: Fields, case_id: int) -> Sequence[EditRequest]:
        """Convert one record into its requests: one, unless a format overrides this; see :meth:`parse`."""
        return [self.parse(row, case_id)]

    def located(self) -> Iterator[Located | BadRow]:
        """Yield requests and bad rows in the file's order, with their lines and remarks."""
        rows = hub_rows(self._source, self.hub) if self._source.startswith(PREFIX) else self.read_file()
        for case_id, (line, row) in enumerate(rows):
            if isinstance(row, str):
                yield BadRow(line, row)
                continue
            fields = Fields(row)
            try:
                requests = [_encodable(request) for request in self.parse_all(fields, case_id)]
            except (UserError, RecursionError) as error:
                yield BadRow(line, str(error))
                continue
            for place, request in enumerate(requests):
                yield Located(request, line, () if place else tuple(fields.notes))

    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield requests and bad rows in the file's order."""
        for found in self.located():
            yield found if isinstance(found, BadRow) else found.request
