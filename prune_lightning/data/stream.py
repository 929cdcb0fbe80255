"""The edit stream: requests in a fixed order, grouped by one explicit protocol."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from prune_lightning.errors import UserError, near
from prune_lightning.types import EditBatch, EditRequest


class EditProtocol(StrEnum):
    """How the edits of a stream follow one another.

    ``single``: each edit on the unedited model. ``batch``: each batch on the unedited model. ``sequential``: one edit
    after another on the same model. ``sequential_batched``: one batch after another on the same model.
    """

    SINGLE = "single"
    BATCH = "batch"
    SEQUENTIAL = "sequential"
    SEQUENTIAL_BATCHED = "sequential_batched"

    @property
    def from_base(self) -> bool:
        """Whether every step starts from the unedited model."""
        return self in (EditProtocol.SINGLE, EditProtocol.BATCH)

    @property
    def one_by_one(self) -> bool:
        """Whether a step holds exactly one request."""
        return self in (EditProtocol.SINGLE, EditProtocol.SEQUENTIAL)


@dataclass(frozen=True)
class BadRow:
    """A record that cannot be used, with the line it begins on and the reason."""

    line: int
    reason: str


class EditStream(L.LightningDataModule, ABC):
    """Base of all edit streams; a data set implements :meth:`records`.

    Args:
        num_edits: How many requests to take; ``None`` for all.
        protocol: See :class:`EditProtocol`.
        batch_size: Requests per step; must be 1 for ``single`` and ``sequential``.
        seed: Seed of the order and of whatever the data set draws.
        shuffle: Take the requests in a random order and not in that of the source.
        unique_subjects: Keep only the first request about each subject (case ignored).
        bad_rows: ``fail`` refuses to start on unusable records, ``skip`` warns and continues; both list them by line.
        done: Sizes of the steps at its beginning that an earlier run has written; the loader begins behind them.

    Attributes:
        requests: The stream's requests, once it is set up.

    Raises:
        UserError: Unknown protocol or policy, or a batch size that the protocol excludes.
    """

    def __init__(
        self,
        num_edits: int | None = None,
        protocol: str = "sequential",
        batch_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        unique_subjects: bool = True,
        bad_rows: str = "fail",
        done: Sequence[int] = (),
    ) -> None:
        super().__init__()
        choices = [choice.value for choice in EditProtocol]
        if protocol not in choices:
            raise UserError(f"unknown data.protocol {protocol!r}: {near(protocol, choices)}")
        if bad_rows not in ("skip", "fail"):
            raise UserError(f"unknown data.bad_rows {bad_rows!r}: {near(bad_rows, ['skip', 'fail'])}")
        for name, value in (("num_edits", 1 if num_edits is None else num_edits), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"data.{name} is expected to be a whole number of at least 1, but got {value!r}")
        if not isinstance(seed, int):
            raise UserError(f"data.seed is expected to be a whole number, but got {seed!r}")
        self.protocol = EditProtocol(protocol)
        if self.protocol.one_by_one and batch_size != 1:
            raise UserError(
                f"data.protocol={protocol} writes one edit at a time, but data.batch_size is {batch_size}; "
                "use data.protocol=sequential_batched (or batch)"
            )
        self.num_edits, self.batch_size, self.seed = num_edits, batch_size, seed
        self.shuffle, self.unique_subjects, self.bad_rows = shuffle, unique_subjects, bad_rows
        self.done = tuple(done)
        self._first = len(self.done)  # step that the loader begins with
        self.requests: list[EditRequest] = []
        self.rejected: list[BadRow] = []

    @abstractmethod
    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield the source's requests in its own order, and what cannot be used."""

    def setup(self, stage: str | None = None) -> None:
        """Read, check, order and cut the requests; the second call does nothing.

        Raises:
            UserError: A bad row under ``bad_rows=fail``, or fewer requests than ``num_edits``.
        """
        if self.requests:
            return
        requests: list[EditRequest] = []
        for record in self.records():
            if isinstance(record, BadRow):
                self.rejected.append(record)
            else:
                requests.append(record)
        self._report_rejected()
        requests = self.ordered(requests)
        wanted = len(requests) if self.num_edits is None else self.num_edits
        if not requests or wanted > len(requests):
            subjects = " about different subjects" if self.unique_subjects else ""
            raise UserError(f"data.num_edits is {wanted}, but there are {len(requests)} usable requests{subjects}")
        self.requests = requests[:wanted]

    def ordered(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests in the order of the stream, repeated subjects taken out if asked."""
        if self.shuffle:
            random.Random(self.seed).shuffle(requests)
        if self.unique_subjects:
            first = {request.subject.lower(): request for request in reversed(requests)}
            requests = [request for request in requests if first[request.subject.lower()] is request]
        return requests

    def _report_rejected(self) -> None:
        if not self.rejected:
            return
        shown = "\n".join(f"  line {row.line}: {row.reason}" for row in self.rejected[:20])
        more = f"\n  and {len(self.rejected) - 20} more" if len(self.rejected) > 20 else ""
        message = f"{len(self.rejected)} records cannot be used:\n{shown}{more}"
        if self.bad_rows == "fail":
            raise UserError(message + "\nmend them, or skip them with data.bad_rows=skip")
        rank_zero_warn(message)

    def batches(self) -> list[EditBatch]:
        """Return the steps of the stream: those that are done as they were, then full batches of what is left."""
        ends = list(accumulate(self.done))
        behind = ends[-1] if ends else 0
        starts = [0, *ends[:-1]] if ends else []
        starts += range(behind, len(self.requests), self.batch_size)
        pairs = zip(starts, [*starts[1:], len(self.requests)], strict=True)
        return [EditBatch(tuple(self.requests[start:end]), self.protocol.from_base) for start, end in pairs]

    def summary(self) -> dict[str, Any]:
        """Return how the edits follow one another, and how many records could not be used."""
        return {"protocol": self.protocol.value, "rejected_records": len(self.rejected)}

    def train_dataloader(self) -> EditLoader:
        """Return a loader of one :class:`~prune_lightning.types.EditBatch` per step that is not done, in order.

        Where all are, it yields one batch without requests, so that training starts and ends.
        """
        return EditLoader(self.batches()[self._first :] or [EditBatch(())])

    def from_start(self) -> EditStream:
        """Return a stream of the same steps of which none is done."""
        stream = copy(self)
        stream._first = 0
        return stream


class EditLoader(DataLoader[Any]):
    """Yields batches of edits in order, and goes on where it was when a checkpoint is resumed.

    Args:
        batches: The steps.
    """

    def __init__(self, batches: Sequence[EditBatch]) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]
        self._batches = batches
        self._next = 0

    def __iter__(self) -> Iterator[EditBatch]:  # type: ignore[override]
        while self._next < len(self._batches):
            self._next += 1
            yield self._batches[self._next - 1]
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """Return where it is."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._next = state["next"]
