"""The ledger's folder: a description of the base, the steps, the end of the stream, and snapshots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load, save

from prune_lightning.atomic_files import SUFFIX, disk_error, write_bytes, write_json
from prune_lightning.devices import in_own_memory
from prune_lightning.errors import UserError
from prune_lightning.ledger.background import BackgroundWriter
from prune_lightning.ledger.files import StepFiles, content_checksum, end_of
from prune_lightning.ledger.record import FinishRecord, StepRecord
from prune_lightning.ledger.snapshots import HeldState, Snapshots

FORMAT = 3


class Ledger:
    """The steps of one run, append-only.

    ``base.json`` describes the model that the steps apply to, by name, revision and fingerprints, without its weights.
    ``steps.jsonl`` holds one line per step, and ``steps.data`` the tensors; see :class:`~.files.StepFiles`.
    ``finish.json`` and ``finish.data`` record the end of the stream. ``snapshot_*`` are whole states.

    A step is complete when its line is written and its tensors fit. It is written in the background while the next one
    is computed, and synced before the next one is written. So a crash loses at most the latest step.

    Args:
        folder: ``ledger/`` in the run's folder.
        base: See ``base.json``.

    Attributes:
        lines: The lines of the complete steps. While a run writes, call :meth:`wait` first.
        finish_line: The line of the end of the stream; ``None`` before that.
        snapshots: The run's snapshots.
    """

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        self.folder, self.base = folder, dict(base)
        self.lines: list[dict[str, Any]] = []
        self.finish_line: dict[str, Any] | None = None
        self.snapshots = Snapshots(folder)
        self._files, self._writer = StepFiles(folder), BackgroundWriter()

    @classmethod
    def create(cls, folder: Path, base: Mapping[str, Any]) -> Ledger:
        """Create a ledger; an existing one is an error.

        Args:
            folder: Created if missing.
            base: JSON-serializable description of the base.

        Raises:
            UserError: The folder holds a ledger, or the disk is full.
        """
        if (folder / "base.json").exists():
            raise UserError(f"{folder} holds the ledger of an earlier run; resume=RUN continues it")
        ledger = cls(folder, base)
        with DiskErrors(ledger):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "base.json", {"format": FORMAT, **base})
            ledger._files.create()
        return ledger

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Read a ledger's lines, up to the last complete step.

        Raises:
            UserError: There is no ledger, it cannot be read, or it has another format.
        """
        if not (folder / "base.json").is_file():
            raise UserError(f"{folder.parent} holds no ledger of edits: nothing was written there, or ledger=false")
        try:
            base = json.loads((folder / "base.json").read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{folder / 'base.json'} is damaged ({error}); the run cannot be resumed") from error
        if (found := base.pop("format", None)) != FORMAT:
            raise UserError(
                f"{folder} has format {found} of the ledger, and this version reads format {FORMAT}: resume or export "
                "the run with the version of prune-lightning that wrote it, or start it again"
            )
        ledger = cls(folder, base)
        ledger.lines = list(ledger._files.lines())
        ledger.finish_line = ledger._read_finish()
        return ledger

    def _read_finish(self) -> dict[str, Any] | None:
        path = self.folder / "finish.json"
        if not path.exists():
            return None
        try:
            line = json.loads(path.read_text("utf-8"))
            fits = content_checksum(self._finish.read_bytes()) == line["checksum"]
            whole = line["step"] == len(self.lines) and fits
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            rank_zero_warn(
                f"{path} does not fit the last step or is damaged: what happened when the stream ended is missing. "
                f"resume={self.folder.parent} repeats it"
            )
        return line if whole else None

    @property
    def _finish(self) -> Path:
        return self.folder / "finish.data"

    @property
    def num_requests(self) -> int:
        """Requests in the complete steps."""
        return self._num_requests(len(self.lines))

    def _num_requests(self, step: int) -> int:
        return self.lines[step - 1]["num_requests"] if step else 0

    @property
    def sizes(self) -> list[int]:
        """The number of requests of each complete step."""
        return [len(line["requests"]) for line in self.lines]

    # -- reading --------------------------------------------------------------------------------------------------
    def steps(self, device: torch.device, first: int = 1, last: int | None = None) -> Iterator[StepRecord]:
        """Yield steps ``first`` to ``last`` after checking their tensors.

        Raises:
            UserError: A step is damaged; the message names the last good edit.
        """
        for line in self.lines[first - 1 : last]:
            tensors = self._files.tensors(line, self._num_requests(line["step"] - 1))
            yield StepRecord.restore(line, tensors, device)

    def finish(self, device: torch.device) -> FinishRecord | None:
        """Return the record of the end of the stream, or ``None``."""
        if self.finish_line is None:
            return None
        return FinishRecord.restore(self.finish_line, in_own_memory(load(self._finish.read_bytes())), device)

    def verified(self) -> Ledger:
        """Return the ledger up to the last step with intact tensors; warn if later steps are dropped."""
        for number, line in enumerate(self.lines):
            try:
                self._files.tensors(line, self._num_requests(number))
            except UserError as error:
                rank_zero_warn(f"{error}; the rest is redone")
                self.lines, self.finish_line = self.lines[:number], None
                break
        return self

    # -- writing --------------------------------------------------------------------------------------------------
    def cut(self) -> None:
        """Truncate the files to :attr:`lines`, before steps are appended again, and remove the end of the stream."""
        with DiskErrors(self):
            (self.folder / "finish.json").unlink(missing_ok=True)
            self._finish.unlink(missing_ok=True)
            self.finish_line = None
            self.snapshots.cut(len(self.lines))
            self._files.cut(self.lines)
            for path in self.folder.glob(f"*{SUFFIX}"):
                path.unlink()

    def append(self, record: StepRecord, state: HeldState | None = None) -> None:
        """Write a step in the background; the next call, or :meth:`wait`, waits for it.

        Args:
            record: The step; its tensors may change when this returns.
            state: The state after the step, for a snapshot. It is written first: no step is complete whose state would
                have to be computed again.

        Raises:
            UserError: The previous step could not be written: the disk is full, or the folder cannot be written. The
                steps before that are intact.
        """
        self.wait()
        line, tensors = record.flatten()
        self._writer.start(partial(self._write, line, save(tensors), state))

    def _write(self, line: Mapping[str, Any], content: bytes, state: HeldState | None) -> None:
        if state is not None:
            self.snapshots.write(state)
        self.lines.append(self._files.append(line, content, end_of(self.lines)))

    def wait(self) -> None:
        """Wait until the latest step is safely on the disk.

        Raises:
            UserError: It could not be written.
        """
        with DiskErrors(self):
            self._writer.wait()

    def append_finish(self, record: FinishRecord, state: HeldState) -> None:
        """Write the final state and the record of the end of the stream.

        Raises:
            UserError: The disk is full, or the folder cannot be written; all steps are intact.
        """
        self.wait()
        line, tensors = record.flatten()
        content = save(tensors)
        with DiskErrors(self):
            self.snapshots.write(state)
            write_bytes(self._finish, content)
            write_json(self.folder / "finish.json", {**line, "checksum": content_checksum(content)})
        self.finish_line = line


class DiskErrors:
    """Turns disk errors into one clear message."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            folder = self.ledger.folder
            raise UserError(
                f"the ledger in {folder} cannot be written: {disk_error(error)}. The last good edit is "
                f"{self.ledger.num_requests}; fix this, then resume={folder.parent} continues from there"
            ) from error
