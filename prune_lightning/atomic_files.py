"""Writes files atomically.

Each function writes a temporary file in the target's folder, syncs it to the disk and renames it over the target. A
reader, or a process after a crash, finds the old file or the new one, never a partial one. Temporary files end in
``.tmp``; only a killed process leaves one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prune_lightning.json_files import nan_to_null

SUFFIX = ".tmp"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file.

    Args:
        path: The file; its folder must exist.
        content: Its content.

    Raises:
        OSError: The file cannot be written. What was there is unchanged.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    _replace(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, UTF-8 with an indent of two. NaN and infinities become ``null``.

    Args:
        path: The file; its folder must exist.
        value: Plain data.

    Raises:
        OSError: The file cannot be written. What was there is unchanged.
    """
    text = json.dumps(nan_to_null(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write a file of one JSON document per line.

    Args:
        path: The file; its folder must exist.
        lines: Plain data.

    Raises:
        OSError: The file cannot be written. What was there is unchanged.
    """
    write_bytes(path, "".join(_line(line) for line in lines).encode())


def append_lines(path: Path, lines: Iterable[Any]) -> None:
    """Append JSON lines to a file; a reader that follows it sees them at once.

    Args:
        path: The file.
        lines: Plain data.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_line(line) for line in lines))


def _line(value: Any) -> str:
    return json.dumps(nan_to_null(value), ensure_ascii=False, allow_nan=False) + "\n"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors.

    Args:
        path: The file; its folder must exist.
        tensors: By name, on any device; no two may share memory.
        metadata: Further entries of the file's header.

    Raises:
        OSError: The file cannot be written. What was there is unchanged.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = None if metadata is None else dict(metadata)

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(held, temporary, metadata=about)
        except SafetensorError as error:
            raise _os_error(error, path) from error
        temporary.chmod(mode)  # safetensors makes its files readable by their owner only; a cache may be shared

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    # Runs may share a folder over a network, so process ids are not unique.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{SUFFIX}")
    try:
        write(temporary)
        with temporary.open("r+b") as file:  # Windows syncs only files that are open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to the target, which takes its place at the end of the block.

    After an error, the folder is deleted, and the target is as it was.

    Args:
        target: The folder to write or to replace; its parent must exist.
    """
    folder, aside = (target.parent / f".{target.name}.{os.getpid()}.{word}" for word in ("partial", "replaced"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            target.rename(aside)
        folder.rename(target)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder permanent, if the file system and the operating system support it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(handle)


def disk_error(error: OSError | SafetensorError) -> str:
    """Return what went wrong with the disk, for a message."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return "the disk is full" if full else str(error)


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """Return the operating system's error, whose number is in safetensors' message."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(str(error))
