"""Files whose records have questions that are asked once all their edits are written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from prune_lightning.data.fields import Fields
from prune_lightning.data.files import FileStream
from prune_lightning.data.rows import BadRow, Located
from prune_lightning.questions import Group, Question
from prune_lightning.types import EditRequest


class GroupedFile(FileStream):
    """Base of the readers of files with questions; a format implements :meth:`parse_group`.

    Args:
        kwargs: See :class:`~prune_lightning.data.files.FileStream`.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        self._groups: list[Group] = []

    @abstractmethod
    def parse_group(self, row: Fields, case_id: int) -> tuple[Sequence[EditRequest], Sequence[Question]]:
        """Convert one record into its requests and its questions; see :meth:`FileStream.parse`."""

    def parse(self, row: Fields, case_id: int) -> EditRequest:
        """Convert one record into its first request."""
        return self.parse_group(row, case_id)[0][0]

    def parse_all(self, row: Fields, case_id: int) -> Sequence[EditRequest]:
        """Convert one record into its requests, and keep its questions."""
        requests, questions = self.parse_group(row, case_id)
        if questions:
            facts = tuple(request.fact for request in requests)
            self._groups.append(Group(row.row.get("case_id", case_id), facts, tuple(questions)))
        return requests

    def located(self) -> Iterator[Located | BadRow]:
        """Yield requests and bad rows in the file's order, with their lines and remarks."""
        self._groups.clear()
        yield from super().located()

    def groups(self) -> Sequence[Group]:
        """Return the groups of all records, also of those that are not taken."""
        return tuple(self._groups)
