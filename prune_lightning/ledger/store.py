"""The ledger's folder: a description of the base, a line per step, the steps' tensors in segments, and snapshots."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lightning.atomic_files import SUFFIX, write_bytes, write_json, write_tensors
from prune_lightning.errors import UserError
from prune_lightning.json_files import nan_to_null
from prune_lightning.ledger.record import FinishRecord, StepRecord
from prune_lightning.ledger.snapshots import Snapshots, checksum

FORMAT = 2
_TOGETHER = 64  # single-step segments to merge into one
_FINISH = "finish"


class Ledger:
    """The steps of one run, append-only.

    ``base.json`` describes the model that the steps apply to, by name, revision and fingerprints, without its weights.
    ``steps.jsonl`` holds one line per step; a step is complete when its line is. ``steps_A_B.safetensors`` hold
    tensors. ``finish.json`` records the end of the stream. ``snapshot_*`` are whole states. Each segment is written to
    a temporary file, synced and renamed before its line is written, so that a crash loses at most the latest step. Each
    line has a checksum of its tensors.

    Args:
        folder: ``ledger/`` in the run's folder.
        base: See ``base.json``.

    Attributes:
        lines: The lines of the complete steps.
        finish_line: The line of the end of the stream; ``None`` before that.
        snapshots: The run's snapshots.
    """

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        self.folder, self.base = folder, dict(base)
        self.lines: list[dict[str, Any]] = []
        self.finish_line: dict[str, Any] | None = None
        self.snapshots = Snapshots(folder)

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
            write_bytes(folder / "steps.jsonl", b"")
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
        ledger.lines = list(ledger._complete_lines())
        ledger.finish_line = ledger._read_finish()
        return ledger

    def _complete_lines(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "steps.jsonl"
        good = 0
        for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), start=1):
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
                whole = line is not None and line["step"] == number and self._segment(number) is not None
            except (ValueError, KeyError, TypeError):
                line, whole = None, False
            if not whole:
                rank_zero_warn(f"{path}: step {number} is incomplete; the last good edit is {good}, the rest is redone")
                return
            assert line is not None
            good = line["num_requests"]
            yield line

    def _read_finish(self) -> dict[str, Any] | None:
        path = self.folder / f"{_FINISH}.json"
        if not path.exists():
            return None
        try:
            line = json.loads(path.read_text("utf-8"))
            whole = line["step"] == len(self.lines) and checksum(_tensors(self._finish_tensors, "")) == line["checksum"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            whole = False
        if not whole:
            rank_zero_warn(
                f"{path} does not fit the last step or is damaged: what happened when the stream ended is missing. "
                f"resume={self.folder.parent} repeats it"
            )
        return line if whole else None

    @property
    def _finish_tensors(self) -> Path:
        return self.folder / f"{_FINISH}.safetensors"

    @property
    def num_requests(self) -> int:
        """Requests in the complete steps."""
        return self.lines[-1]["num_requests"] if self.lines else 0

    @property
    def sizes(self) -> list[int]:
        """The number of requests of each complete step."""
        return [len(line["requests"]) for line in self.lines]

    # -- reading --------------------------------------------------------------------------------------------------
    def steps(self, device: torch.device, first: int = 1, last: int | None = None) -> Iterator[StepRecord]:
        """Yield steps ``first`` to ``last`` after checking their tensors.

        Raises:
            UserError: A segment is damaged; the message names the last good edit.
        """
        for line in self.lines[first - 1 : last]:
            yield StepRecord.restore(line, self._tensors_of(line), device)

    def finish(self, device: torch.device) -> FinishRecord | None:
        """Return the record of the end of the stream, or ``None``."""
        if self.finish_line is None:
            return None
        return FinishRecord.restore(self.finish_line, _tensors(self._finish_tensors, ""), device)

    def verified(self) -> Ledger:
        """Return the ledger up to the last step with intact tensors; warn if later steps are dropped."""
        for number, line in enumerate(self.lines):
            try:
                self._tensors_of(line)
            except UserError as error:
                rank_zero_warn(f"{error}; the rest is redone")
                self.lines, self.finish_line = self.lines[:number], None
                break
        return self

    def _tensors_of(self, line: Mapping[str, Any]) -> dict[str, Tensor]:
        step = line["step"]
        path = self._segment(step)
        good = self.lines[step - 2]["num_requests"] if step > 1 else 0
        try:
            if path is None:
                raise FileNotFoundError("it is missing")
            tensors = _tensors(path, f"{step}/")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): the last good edit is {good}") from error
        if checksum(tensors) != line["checksum"]:
            raise UserError(f"{path} is damaged (checksum of step {step}): the last good edit is {good}")
        return tensors

    def _segment(self, step: int) -> Path | None:
        """Return the file that holds a step's tensors, preferably a merged one."""
        first = (step - 1) // _TOGETHER * _TOGETHER + 1
        for a, b in ((first, first + _TOGETHER - 1), (step, step)):
            if (path := self.folder / f"steps_{a:06d}_{b:06d}.safetensors").exists():
                return path
        return None

    def _single(self, step: int) -> Path:
        return self.folder / f"steps_{step:06d}_{step:06d}.safetensors"

    # -- writing --------------------------------------------------------------------------------------------------
    def cut(self) -> None:
        """Truncate the files to :attr:`lines`, before steps are appended again, and remove the end of the stream."""
        with DiskErrors(self):
            kept = len(self.lines)
            (self.folder / f"{_FINISH}.json").unlink(missing_ok=True)
            self._finish_tensors.unlink(missing_ok=True)
            self.finish_line = None
            self.snapshots.cut(kept)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
            write_bytes(self.folder / "steps.jsonl", text.encode())
            for path in sorted(self.folder.glob("steps_*_*.safetensors")):
                first, last = (int(number) for number in path.stem.split("_")[1:])
                if first <= kept < last:
                    self._take_apart(path, range(first, kept + 1))
                if last > kept or (first == last and self._segment(last) != path):
                    path.unlink()
            for path in self.folder.glob(f"*{SUFFIX}"):
                path.unlink()

    def _take_apart(self, path: Path, steps: range) -> None:
        """Split some steps of a merged segment into one segment each."""
        for step in steps:
            tensors = _tensors(path, f"{step}/")
            write_tensors(self._single(step), {f"{step}/{name}": tensor for name, tensor in tensors.items()})

    def append(self, record: StepRecord) -> None:
        """Write a step. When this returns, the step is safely on disk.

        Raises:
            UserError: The disk is full, or the folder cannot be written; earlier steps are intact.
        """
        line, tensors = _prepared(record)
        with DiskErrors(self):
            named = {f"{record.step}/{name}": tensor for name, tensor in tensors.items()}
            write_tensors(self._single(record.step), named)
            with (self.folder / "steps.jsonl").open("ab") as file:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            self.lines.append(line)
            if record.step % _TOGETHER == 0:
                self._bring_together(record.step)

    def append_finish(self, record: FinishRecord) -> None:
        """Write the record of the end of the stream.

        Raises:
            UserError: The disk is full, or the folder cannot be written; all steps are intact.
        """
        line, tensors = _prepared(record)
        with DiskErrors(self):
            write_tensors(self._finish_tensors, tensors)
            write_json(self.folder / f"{_FINISH}.json", line)
        self.finish_line = line

    def _bring_together(self, last: int) -> None:
        steps = range(last - _TOGETHER + 1, last + 1)
        singles = [self._single(step) for step in steps]
        together: dict[str, Tensor] = {}
        for path in singles:
            together |= _tensors(path, "")
        write_tensors(self.folder / f"steps_{steps[0]:06d}_{last:06d}.safetensors", together)
        for path in singles:
            path.unlink()


def _prepared(record: StepRecord | FinishRecord) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the line of a record, with a checksum of its tensors, and the tensors."""
    line, tensors = record.flatten()
    return nan_to_null({**line, "checksum": checksum(tensors)}), tensors


def _tensors(path: Path, start: str) -> dict[str, Tensor]:
    """Return the tensors of a file whose names start with ``start``, without that prefix."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118 - the file is no mapping
        return {name.removeprefix(start): file.get_tensor(name) for name in names}


class DiskErrors:
    """Turns disk errors into one clear message."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            folder = self.ledger.folder
            raise UserError(
                f"the ledger in {folder} cannot be written: {reason}. The last good edit is "
                f"{self.ledger.num_requests}; fix this, then resume={folder.parent} continues from there"
            ) from error
