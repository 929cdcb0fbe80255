"""The ledger's folder: a description of the base, a line per step, and the steps' tensors in segments."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.json_files import nan_to_null
from prune_lightning.ledger.record import StepRecord

FORMAT = 1
_TOGETHER = 64  # single-step segments that become one


class Ledger:
    """The steps of one run, append-only.

    ``base.json`` says what the steps are relative to: the model by name, revision and fingerprints, never its weights.
    ``steps.jsonl`` holds a line per step; a step is complete when its line is. ``steps_A_B.safetensors`` hold tensors.
    Segments are written aside, synced and renamed before the line that needs them, so that whatever happens, at worst
    the latest step is missing. Each line carries a checksum of its tensors.

    Args:
        folder: ``ledger/`` in the run's folder.

    Attributes:
        base: What ``base.json`` says.
        lines: The lines of the complete steps.
    """

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        self.folder, self.base = folder, dict(base)
        self.lines: list[dict[str, Any]] = []

    @classmethod
    def create(cls, folder: Path, base: Mapping[str, Any]) -> Ledger:
        """Begin a ledger; one that is there already is refused.

        Args:
            folder: Made if it is not there.
            base: JSON-able.

        Raises:
            UserError: There is one, or the disk is full.
        """
        if (folder / "base.json").exists():
            raise UserError(f"{folder} holds the ledger of an earlier run; resume=RUN goes on with it")
        ledger = cls(folder, base)
        with _disk(ledger):
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "base.json", json.dumps({"format": FORMAT, **nan_to_null(base)}, indent=2).encode())
            _write(folder / "steps.jsonl", b"")
        return ledger

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Read a ledger's lines, up to the last complete step.

        Raises:
            UserError: There is none, or it cannot be read; the message names the last good edit.
        """
        if not (folder / "base.json").is_file():
            raise UserError(f"{folder.parent} holds no ledger of edits: nothing was written there, or `ledger=null`")
        try:
            base = json.loads((folder / "base.json").read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{folder / 'base.json'} is damaged ({error}); the run cannot be gone on with") from error
        if base.pop("format", None) != FORMAT:
            raise UserError(f"{folder} was written by another version of the project")
        ledger = cls(folder, base)
        ledger.lines = list(ledger._complete_lines())
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
                rank_zero_warn(
                    f"{path}: step {number} is not whole; the last good edit is {good}, what follows is done anew"
                )
                return
            assert line is not None
            good = line["num_edits"]
            yield line

    @property
    def num_edits(self) -> int:
        """Edits in the complete steps."""
        return self.lines[-1]["num_edits"] if self.lines else 0

    # -- reading --------------------------------------------------------------------------------------------------
    def records(self, device: torch.device, first: int = 1, last: int | None = None) -> Iterator[StepRecord]:
        """Yield steps ``first`` to ``last``, their tensors checked.

        Raises:
            UserError: A segment is damaged; the message names the last good edit.
        """
        for line in self.lines[first - 1 : last]:
            yield StepRecord.restore(line, self._tensors(line), device)

    def verified(self) -> Ledger:
        """Return the ledger cut after the last step whose tensors are whole, with a warning if that is earlier."""
        for number, line in enumerate(self.lines):
            try:
                self._tensors(line)
            except UserError as error:
                rank_zero_warn(f"{error}; what follows is done anew")
                self.lines = self.lines[:number]
                break
        return self

    def _tensors(self, line: Mapping[str, Any]) -> dict[str, Tensor]:
        step = line["step"]
        path = self._segment(step)
        good = self.lines[step - 2]["num_edits"] if step > 1 else 0
        try:
            assert path is not None
            with safe_open(path, framework="pt") as file:
                start = f"{step}/"
                names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118 - the file is no mapping
                tensors = {name.removeprefix(start): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, AssertionError) as error:
            raise UserError(f"{path} is damaged ({error}): the last good edit is {good}") from error
        if _checksum(tensors) != line["checksum"]:
            raise UserError(f"{path} is damaged (checksum of step {step}): the last good edit is {good}")
        return tensors

    def _segment(self, step: int) -> Path | None:
        """Return the file that holds a step's tensors; of two, the one of many steps."""
        first = (step - 1) // _TOGETHER * _TOGETHER + 1
        for a, b in ((first, first + _TOGETHER - 1), (step, step)):
            if (path := self.folder / f"steps_{a:06d}_{b:06d}.safetensors").exists():
                return path
        return None

    def _single(self, step: int) -> Path:
        return self.folder / f"steps_{step:06d}_{step:06d}.safetensors"

    # -- writing --------------------------------------------------------------------------------------------------
    def cut(self) -> None:
        """Make the files end where :attr:`lines` do, before steps are appended again."""
        with _disk(self):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
            _write(self.folder / "steps.jsonl", text.encode())
            kept = len(self.lines)
            for path in sorted(self.folder.glob("steps_*_*.safetensors")):
                first, last = (int(number) for number in path.stem.split("_")[1:])
                if first <= kept < last:
                    self._take_apart(path, range(first, kept + 1))
                if last > kept or (first == last and self._segment(last) != path):
                    path.unlink()
            for path in self.folder.glob("*.tmp"):
                path.unlink()

    def _take_apart(self, path: Path, steps: range) -> None:
        """Give some steps of a segment of many a segment each."""
        with safe_open(path, framework="pt") as file:
            for step in steps:
                names = [name for name in file.keys() if name.startswith(f"{step}/")]  # noqa: SIM118
                _write_tensors(self._single(step), {name: file.get_tensor(name) for name in names})

    def append(self, record: StepRecord) -> None:
        """Write a step: when this returns, it outlives whatever happens to the process.

        Raises:
            UserError: The disk is full, or the folder cannot be written; earlier steps are whole.
        """
        line, tensors = record.flatten()
        line = nan_to_null({**line, "checksum": _checksum(tensors)})
        with _disk(self):
            _write_tensors(
                self._single(record.step), {f"{record.step}/{name}": tensor for name, tensor in tensors.items()}
            )
            with (self.folder / "steps.jsonl").open("ab") as file:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            self.lines.append(line)
            if record.step % _TOGETHER == 0:
                self._bring_together(record.step)

    def _bring_together(self, last: int) -> None:
        steps = range(last - _TOGETHER + 1, last + 1)
        singles = [self._single(step) for step in steps]
        together: dict[str, Tensor] = {}
        for path in singles:
            with safe_open(path, framework="pt") as file:
                together |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _write_tensors(self.folder / f"steps_{steps[0]:06d}_{last:06d}.safetensors", together)
        for path in singles:
            path.unlink()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    save_file(tensors, aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last; not every file system or operating system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


class _disk:
    """Turns trouble with the disk into one clear message."""

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
                f"the ledger in {folder} cannot be written: {reason}. The last good edit is {self.ledger.num_edits}; "
                f"when that is mended, resume={folder.parent} goes on from there"
            ) from error
