"""A stream of requests that are given in Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prune_lightning.data.rows import BadRow, listed
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.types import EditRequest


class GivenRequests(EditStream):
    """An edit stream over requests in memory.

    Args:
        given: The requests, in order.
        kwargs: See :class:`~prune_lightning.data.stream.EditStream`; repeated subjects are kept by default.
    """

    def __init__(self, given: Sequence[EditRequest], unique_subjects: bool = False, **kwargs: Any) -> None:
        super().__init__(unique_subjects=unique_subjects, **kwargs)
        self.given = tuple(given)

    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield the requests."""
        yield from self.given

    def _refuse(self, rows: Sequence[BadRow]) -> None:
        if rows:
            raise UserError(listed("these facts cannot be used", rows))
