"""The edit stream: requests in a fixed order, grouped by one explicit protocol."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from prune_lightning.data.fitting import doubts, fit_to_model
from prune_lightning.data.loader import EditLoader
from prune_lightning.data.protocol import EditProtocol
from prune_lightning.data.rows import BadRow, Located, listed
from prune_lightning.errors import UserError, near, shown
from prune_lightning.models.tokenization import Tokens
from prune_lightning.requests import PLAIN
from prune_lightning.text.separators import AUTO, checked_separator
from prune_lightning.types import EditBatch, EditRequest


class EditStream(L.LightningDataModule, ABC):
    """Base of all edit streams; a data set implements :meth:`records`.

    Args:
        num_edits: How many requests to take; ``None`` for all. Where there are fewer, all of them are taken.
        protocol: See :class:`EditProtocol`.
        batch_size: Requests per step; must be 1 for ``single`` and ``sequential``.
        seed: Seed of the order and of whatever the data set draws.
        shuffle: Take the requests in a random order and not in that of the source.
        unique_subjects: Keep only the first request about each subject (case ignored).
        bad_rows: ``fail`` refuses to start on unusable records, ``skip`` leaves them out; both list them by line.
        separator: What stands between prompts and targets that say nothing of their own: ``auto``, ``blank``, ``none``
            or the text itself, see :func:`~prune_lightning.text.separators.join`.
        chat_template: Write and score every prompt as a user's turn in the tokenizer's chat template; needs
            :meth:`fit`.
        done: Sizes of the steps at its beginning that an earlier run has written; the loader begins behind them.

    Attributes:
        requests: The stream's requests, once it is set up.
        rejected: Records that cannot be used.
        left_out: All records that are not taken, the rejected ones among them, but for those behind ``num_edits``.
        remarks: What is doubtful about the requests that are taken.

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
        separator: str = AUTO,
        chat_template: bool = False,
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
        self.separator, self.chat_template = checked_separator("data.separator", separator), chat_template
        self.done = tuple(done)
        self._first = len(self.done)  # step that the loader begins with
        self.requests: list[EditRequest] = []
        self.rejected: list[BadRow] = []
        self.left_out: list[BadRow] = []
        self.remarks: list[BadRow] = []
        self._candidates: list[Located] = []
        self._fitted = False

    @abstractmethod
    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield the source's requests in its own order, and what cannot be used."""

    def located(self) -> Iterator[Located | BadRow]:
        """Yield the records with their places; a source that knows lines and remarks tells them here."""
        for number, record in enumerate(self.records(), start=1):
            yield record if isinstance(record, BadRow) else Located(record, number)

    def read(self) -> tuple[list[Located], list[BadRow]]:
        """Return the usable records in their source's order, with all that is doubtful, and those that are not."""
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
        """Read, check, order and cut the requests; the second call does nothing.

        Raises:
            UserError: A bad row under ``bad_rows=fail``, or no usable record.
        """
        if self.requests:
            return
        usable, self.rejected = self.read()
        self._refuse(self.rejected)
        self._candidates, repeated = self.arranged(usable)
        self.left_out = sorted([*self.rejected, *repeated], key=lambda row: row.line)
        if repeated:
            rank_zero_warn(listed(f"{len(repeated)} records are left out", repeated))
        self._take(self._candidates)
        if self.num_edits is not None and (count := len(self.requests)) < self.num_edits:
            rank_zero_warn(f"data.num_edits is {self.num_edits}, but only {count} records are usable; all are taken")

    def fit(self, tokens: Tokens, unusable: Callable[[EditRequest], str | None] | None = None) -> None:
        """Check the requests against a model before the first edit; further ones take the place of those left out.

        Args:
            tokens: The model's tokens. With ``chat_template`` every prompt becomes a turn in its template.
            unusable: Says why a method cannot write a request.

        Raises:
            UserError: A request does not fit under ``bad_rows=fail``, or none fits.
        """
        self.setup()
        fitting, misfits = self.fitting(self._candidates, tokens, unusable, self.num_edits)
        self.rejected += misfits
        self.left_out = sorted([*self.left_out, *misfits], key=lambda row: row.line)
        self._refuse(misfits)
        self._fitted = True
        self._take(fitting)
        if self.remarks:
            rank_zero_warn(listed(f"{len(self.remarks)} remarks on the data", self.remarks))

    def fitting(
        self,
        candidates: Sequence[Located],
        tokens: Tokens,
        unusable: Callable[[EditRequest], str | None] | None = None,
        count: int | None = None,
    ) -> tuple[list[Located], list[BadRow]]:
        """Return the records that fit a model and a method, in the chat template if that is wanted, and the others.

        Args:
            candidates: The records.
            tokens: See :meth:`fit`.
            unusable: See :meth:`fit`.
            count: Stop when so many have been found.
        """
        frame = tokens.chat_frame() if self.chat_template else PLAIN
        fitting: list[Located] = []
        misfits: list[BadRow] = []
        for one in candidates:
            if len(fitting) == count:
                break
            request = one.request.in_frame(frame) if any(frame) else one.request
            fit = fit_to_model(request, tokens)
            if reason := (unusable and unusable(request)) or fit.reason:
                misfits.append(BadRow(one.line, reason))
            else:
                fitting.append(Located(request, one.line, (*one.remarks, *fit.doubts)))
        return fitting, misfits

    def _take(self, candidates: Sequence[Located]) -> None:
        if not candidates:
            raise UserError(f"the data hold no usable record; {len(self.left_out)} cannot be used")
        taken = candidates[: self.num_edits]
        self.requests = [one.request for one in taken]
        self.remarks = [BadRow(one.line, remark) for one in taken for remark in one.remarks]

    def arranged(self, usable: Sequence[Located]) -> tuple[list[Located], list[BadRow]]:
        """Return the records in the order of the stream, and those that :meth:`ordered` leaves out, with the reason."""
        by_identity = {id(one.request): one for one in usable}
        kept = [by_identity[id(request)] for request in self.ordered([one.request for one in usable])]
        present = {id(one.request) for one in kept}
        lines = {one.request.subject.lower(): one.line for one in kept}
        repeated = [
            BadRow(
                one.line,
                f"its subject {shown(one.request.subject)} is that of line {lines[one.request.subject.lower()]} "
                "(data.unique_subjects=false keeps both)",
            )
            for one in usable
            if id(one.request) not in present
        ]
        return kept, repeated

    def ordered(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests in the order of the stream, repeated subjects taken out if asked."""
        if self.shuffle:
            random.Random(self.seed).shuffle(requests)
        if self.unique_subjects:
            first = {request.subject.lower(): request for request in reversed(requests)}
            requests = [request for request in requests if first[request.subject.lower()] is request]
        return requests

    def _refuse(self, rows: Sequence[BadRow]) -> None:
        if not rows:
            return
        message = listed(f"{len(rows)} records cannot be used", rows)
        if self.bad_rows == "fail":
            raise UserError(message + "\nmend them, or skip them with data.bad_rows=skip")
        rank_zero_warn(message)

    def superseded(self) -> dict[int, int]:
        """Return, by place of a request, the edit count at which a later one gives its prompt another target.

        From there on the earlier edit is not forgotten but overwritten on purpose. Where every step starts from the
        unedited model no edit supersedes another.
        """
        if self.protocol.from_base:
            return {}
        ends = self._ends()
        found: dict[int, int] = {}
        latest: dict[tuple[str, str], int] = {}
        for place, request in enumerate(self.requests):
            key = request.subject.lower(), request.pair().context
            if key in latest and self.requests[latest[key]].target_new != request.target_new:
                found[latest[key]] = next(end for end in ends if end > place)
            latest[key] = place
        return found

    def summary(self) -> dict[str, Any]:
        """Return how the edits follow one another, and what became of every record."""
        superseded = [{"edit": place + 1, "by_edits": count} for place, count in self.superseded().items()]
        records = {
            "asked": self.num_edits,
            "taken": len(self.requests),
            "left_out": [vars(row) for row in self.left_out],
            "remarks": [vars(row) for row in self.remarks],
            "superseded": superseded,
        }
        return {"protocol": self.protocol.value, "rejected_records": len(self.rejected), "records": records}

    def batches(self) -> list[EditBatch]:
        """Return the steps of the stream: those that are done as they were, then full batches of what is left.

        Raises:
            UserError: A chat template is wanted, but :meth:`fit` was not called.
        """
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

        Where all are, it yields one batch without requests, so that training starts and ends.
        """
        return EditLoader(self.batches()[self._first :] or [EditBatch(())])

    def from_start(self) -> EditStream:
        """Return a stream of the same steps of which none is done."""
        stream = copy(self)
        stream._first = 0
        return stream
