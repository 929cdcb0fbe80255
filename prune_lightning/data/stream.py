"""The edit stream: requests in a fixed order, grouped into steps by a protocol."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from prune_lightning.data.fitting import doubts, fitting
from prune_lightning.data.knowledge import ALL, EXACT, Division, KeepRule, Knows
from prune_lightning.data.loader import EditLoader
from prune_lightning.data.placing import placed
from prune_lightning.data.protocol import protocol_named, superseded
from prune_lightning.data.rows import BadRow, Located, listed, repeated
from prune_lightning.errors import UserError, one_of
from prune_lightning.models.tokenization import Tokens
from prune_lightning.questions import Group, PlacedGroup
from prune_lightning.ranges import Count
from prune_lightning.requests import PLAIN
from prune_lightning.text.separators import AUTO, checked_separator
from prune_lightning.types import EditBatch, EditRequest


class EditStream(L.LightningDataModule, ABC):
    """Base of all edit streams; a data set implements :meth:`records`.

    Args:
        num_edits: Number of requests; ``None`` for all. If there are fewer, all are used.
        protocol: See :class:`~.protocol.EditProtocol`.
        batch_size: Requests per step; must be 1 for ``single`` and ``sequential``.
        seed: Seed of the order and of the data set's random choices.
        shuffle: Whether to use the requests in random order.
        unique_subjects: Whether to keep only the first request about each subject (ignoring case).
        bad_rows: ``fail`` refuses to start on unusable records, ``skip`` leaves them out; both list them by line.
        separator: The text between prompts and targets, for records without their own: ``auto``, ``blank``, ``none`` or
            a literal text, see :func:`~prune_lightning.text.separators.join`.
        chat_template: Whether to write and score every prompt as a user's turn in the tokenizer's chat template; needs
            :meth:`fit`.
        keep: Which records to keep, by what the unedited model knows; see :class:`~.knowledge.KeepRule`. Anything but
            ``all`` needs :meth:`fit` and :meth:`select`.
        known_by: What counts as knowing, see :class:`~.knowledge.KeepRule`.
        done: Sizes of the first steps, which an earlier run has written; the loader begins after them.

    Attributes:
        requests: The stream's requests, after :meth:`setup`.
        rejected: Records that cannot be used.
        left_out: All records that are not used, including the rejected ones, except those after ``num_edits``.
        remarks: Remarks about doubtful points of the requests.

    Raises:
        UserError: Unknown protocol or policy, or a batch size that the protocol does not allow.
    """

    def __init__(
        self,
        num_edits: Count | None = None,
        protocol: str = "sequential",
        batch_size: Count = 1,
        seed: int = 0,
        shuffle: bool = False,
        unique_subjects: bool = True,
        bad_rows: str = "fail",
        separator: str = AUTO,
        chat_template: bool = False,
        keep: str = ALL,
        known_by: str = EXACT,
        done: Sequence[int] = (),
    ) -> None:
        super().__init__()
        one_of("data.bad_rows", bad_rows, ("skip", "fail"))
        for name, value in (("num_edits", 1 if num_edits is None else num_edits), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"data.{name} is expected to be a whole number of at least 1, but got {value!r}")
        if not isinstance(seed, int):
            raise UserError(f"data.seed is expected to be a whole number, but got {seed!r}")
        self.protocol = protocol_named(protocol, batch_size)
        self.num_edits, self.batch_size, self.seed = num_edits, batch_size, seed
        self.shuffle, self.unique_subjects, self.bad_rows = shuffle, unique_subjects, bad_rows
        self.separator, self.chat_template = checked_separator("data.separator", separator), chat_template
        self.rule = KeepRule(keep, known_by)
        self.done = tuple(done)
        self._first = len(self.done)  # first step of the loader
        self.requests: list[EditRequest] = []
        self.rejected: list[BadRow] = []
        self.left_out: list[BadRow] = []
        self.remarks: list[BadRow] = []
        self._candidates: list[Located] = []
        self._division: Division | None = None
        self._fitted = False

    @property
    def num_candidates(self) -> int:
        """Number of records among which :meth:`select` chooses."""
        return len(self._candidates)

    def groups(self) -> Sequence[Group]:
        """Return the groups of edits that have questions of their own, after :meth:`setup`; none by default."""
        return ()

    def placed_groups(self) -> list[PlacedGroup]:
        """Return the groups of which the stream writes an edit, with the request that completes each."""
        return placed(self.groups(), self.batches(), self.superseded()) if self.groups() else []

    @abstractmethod
    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield the source's requests in its own order, and the records that cannot be used."""

    def located(self) -> Iterator[Located | BadRow]:
        """Yield the records with their positions; a source with lines and remarks overrides this."""
        for number, record in enumerate(self.records(), start=1):
            yield record if isinstance(record, BadRow) else Located(record, number)

    def read(self) -> tuple[list[Located], list[BadRow]]:
        """Return the usable records in their source's order, with remarks, and those that cannot be used."""
        usable: list[Located] = []
        rejected: list[BadRow] = []
        for record in self.located():
            if isinstance(record, BadRow):
                rejected.append(record)
                continue
            request = record.request if self.separator == AUTO else record.request.with_separator(self.separator)
            usable.append(Located(request, record.line, (*record.remarks, *doubts(request))))
        return usable, rejected

    def setup(self, stage: str | None = None) -> None:
        """Read, check, order and truncate the requests; a second call does nothing.

        Raises:
            UserError: A bad row under ``bad_rows=fail``, or no usable record.
        """
        if self.requests:
            return
        usable, self.rejected = self.read()
        self._refuse(self.rejected)
        self._candidates, others = self.arranged(usable)
        self.left_out = sorted([*self.rejected, *others], key=lambda row: row.line)
        if others:
            rank_zero_warn(listed(f"{len(others)} records are left out", others))
        self._take(self._candidates)
        self._warn_if_fewer("are usable")

    def fit(self, tokens: Tokens, unusable: Callable[[EditRequest], str | None] | None = None) -> None:
        """Check the requests against a model before the first edit; later records replace those left out.

        With a :attr:`rule` that needs the model, all records are checked, and :meth:`select` chooses among them.

        Args:
            tokens: The model's tokens. With ``chat_template`` every prompt becomes a turn in its template.
            unusable: Returns the reason why a method cannot write a request, or ``None``.

        Raises:
            UserError: A request does not fit under ``bad_rows=fail``, or none fits.
        """
        self.setup()
        count = None if self.rule.needs_model else self.num_edits
        fitting, misfits = self.fitting(self._candidates, tokens, unusable, count)
        self._candidates = fitting
        self.rejected += misfits
        self.left_out = sorted([*self.left_out, *misfits], key=lambda row: row.line)
        self._refuse(misfits)
        self._fitted = True
        self._take(fitting)
        if self.remarks:
            rank_zero_warn(listed(f"{len(self.remarks)} remarks on the data", self.remarks))

    def select(self, knows: Knows) -> Division | None:
        """Keep the records that :attr:`rule` asks for; after :meth:`fit`. Return what it did, if it asks for any.

        Args:
            knows: See :data:`~.knowledge.Knows`.

        Raises:
            UserError: No record is kept.
        """
        if not self.rule.needs_model:
            return None
        self._division = division = self.rule.divide(self._candidates, knows, self.num_edits)
        self.left_out = sorted([*self.left_out, *division.left_out], key=lambda row: row.line)
        self._take(division.kept)
        self._warn_if_fewer(f"are kept under data.keep={self.rule.keep}")
        return division

    def _warn_if_fewer(self, which: str) -> None:
        if self.num_edits is not None and (count := len(self.requests)) < self.num_edits:
            rank_zero_warn(f"data.num_edits is {self.num_edits}, but only {count} records {which}; all are taken")

    def fitting(
        self,
        candidates: Sequence[Located],
        tokens: Tokens,
        unusable: Callable[[EditRequest], str | None] | None = None,
        count: int | None = None,
    ) -> tuple[list[Located], list[BadRow]]:
        """Return the records that fit a model and a method, and the others; see :func:`~.fitting.fitting`."""
        return fitting(candidates, tokens, tokens.chat_frame() if self.chat_template else PLAIN, unusable, count)

    def _take(self, candidates: Sequence[Located]) -> None:
        if not candidates:
            raise UserError(f"the data hold no usable record; {len(self.left_out)} cannot be used")
        taken = candidates[: self.num_edits]
        self.requests = [one.request for one in taken]
        self.remarks = [BadRow(one.line, remark) for one in taken for remark in one.remarks]

    def arranged(self, usable: Sequence[Located]) -> tuple[list[Located], list[BadRow]]:
        """Return the records in the order of the stream, and those that :meth:`ordered` leaves out, with reasons."""
        by_identity = {id(one.request): one for one in usable}
        kept = [by_identity[id(request)] for request in self.ordered([one.request for one in usable])]
        return kept, repeated(usable, kept, self.unique_subjects)

    def ordered(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests in the order of the stream, without repeated subjects if ``unique_subjects`` is set."""
        if self.shuffle:
            requests = self.shuffled(requests)
        if self.unique_subjects:
            first = {request.subject.lower(): request for request in reversed(requests)}
            requests = [request for request in requests if first[request.subject.lower()] is request]
        return requests

    def shuffled(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests in random order."""
        random.Random(self.seed).shuffle(requests)
        return requests

    def _refuse(self, rows: Sequence[BadRow]) -> None:
        if not rows:
            return
        message = listed(f"{len(rows)} records cannot be used", rows)
        if self.bad_rows == "fail":
            raise UserError(message + "\nfix them, or skip them with data.bad_rows=skip")
        rank_zero_warn(message)

    def superseded(self) -> dict[int, int]:
        """Return, by a request's index, the edit count at which a later one gives its prompt another target.

        From then on the earlier edit is overwritten on purpose, not forgotten. If every step starts from the unedited
        model, no edit supersedes another.
        """
        if self.protocol.from_base:
            return {}
        return superseded(self.requests, self._ends())

    def summary(self) -> dict[str, Any]:
        """Return the protocol and the numbers of used and left-out records."""
        superseded = [{"edit": place + 1, "by_edits": count} for place, count in self.superseded().items()]
        records: dict[str, Any] = {
            "asked": self.num_edits,
            "taken": len(self.requests),
            "left_out": [vars(row) for row in self.left_out],
            "remarks": [vars(row) for row in self.remarks],
            "superseded": superseded,
        }
        if self._division:
            records["knowledge"] = self._division.summary()
        return {"protocol": self.protocol.value, "rejected_records": len(self.rejected), "records": records}

    def batches(self) -> list[EditBatch]:
        """Return the steps of the stream: first those of ``done``, then full batches of the rest.

        Raises:
            UserError: ``chat_template`` is set, but :meth:`fit` was not called, or ``keep`` without :meth:`select`.
        """
        if self.rule.needs_model and not self._division:
            raise UserError(f"data.keep={self.rule.keep} needs the model: call fit(tokens) and select(knows)")
        if self.chat_template and not self._fitted:
            raise UserError("data.chat_template needs the tokenizer: call fit(model.tokens) before the edits")
        return [
            EditBatch(tuple(self.requests[start:end]), self.protocol.from_base)
            for start, end in zip([0, *self._ends()], self._ends(), strict=False)
        ]

    def _ends(self) -> list[int]:
        """Return the edit count at which each step ends."""
        done = list(accumulate(self.done))
        starts = range(done[-1] if done else 0, len(self.requests), self.batch_size)
        return [*done, *(min(start + self.batch_size, len(self.requests)) for start in starts)]

    def train_dataloader(self) -> EditLoader:
        """Return a loader of one :class:`~prune_lightning.types.EditBatch` per step that is not done, in order.

        If all are done, it yields one batch without requests, so that training starts and ends.
        """
        return EditLoader(self.batches()[self._first :] or [EditBatch(())])

    def from_start(self) -> EditStream:
        """Return a stream of the same steps with none of them done."""
        stream = copy(self)
        stream._first = 0
        return stream
