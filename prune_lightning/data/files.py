"""Streams that are read from a JSON or JSONL file: lines are kept, so that a bad record can be found."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_lightning.data.stream import BadRow, EditStream
from prune_lightning.errors import UserError
from prune_lightning.records import read_objects
from prune_lightning.types import EditRequest


class FileStream(EditStream):
    """Base of the file readers; a format implements :meth:`parse`.

    Args:
        path: JSON array or JSONL file.
        kwargs: See :class:`~prune_lightning.data.stream.EditStream`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()

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
                yield self.parse(row, case_id)
            except KeyError as error:
                yield BadRow(line, f"the key {error} is missing")
            except (UserError, TypeError, AttributeError, IndexError) as error:
                yield BadRow(line, str(error))
