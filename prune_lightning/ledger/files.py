"""The two files of a ledger's steps: a line of JSON per step, and the tensors of one step after another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load
from torch import Tensor

from prune_lightning.atomic_files import write_bytes
from prune_lightning.devices import in_own_memory
from prune_lightning.errors import UserError
from prune_lightning.json_files import nan_to_null


class StepFiles:
    """``steps.jsonl`` and ``steps.data``, append-only.

    A line has the place and the checksum of its tensors, which are stored as safetensors. So it does not matter which
    of the two files reaches the disk first.

    Args:
        folder: The ledger's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.text, self.data = folder / "steps.jsonl", folder / "steps.data"

    def create(self) -> None:
        """Create empty files."""
        write_bytes(self.text, b"")
        write_bytes(self.data, b"")

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines up to the first incomplete one; warn if there is one. The tensors are not read."""
        size = self.data.stat().st_size if self.data.exists() else -1
        good = end = 0
        texts = self.text.read_bytes().splitlines(keepends=True) if self.text.exists() else ()
        for number, text in enumerate(texts, start=1):
            try:
                line = json.loads(text) if text.endswith(b"\n") else {}
                whole = (line["step"], line["offset"]) == (number, end) and end + line["bytes"] <= size
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                rank_zero_warn(
                    f"{self.text}: step {number} is incomplete; the last good edit is {good}, the rest is redone"
                )
                return
            good, end = line["num_requests"], end + line["bytes"]
            yield line

    def tensors(self, line: Mapping[str, Any], good: int) -> dict[str, Tensor]:
        """Return the tensors of a line.

        Args:
            line: The line.
            good: The last edit before its step, for the message.

        Raises:
            UserError: They are damaged.
        """
        try:
            with self.data.open("rb") as file:
                file.seek(line["offset"])
                content = file.read(line["bytes"])
        except OSError as error:
            raise UserError(f"{self.data} is damaged ({error}): the last good edit is {good}") from error
        if content_checksum(content) != line["checksum"]:
            raise UserError(f"{self.data} is damaged (checksum of step {line['step']}): the last good edit is {good}")
        return in_own_memory(load(content))

    def append(self, line: Mapping[str, Any], content: bytes, offset: int) -> dict[str, Any]:
        """Append a step, sync both files, and return the line as written.

        Args:
            line: The line, without place and checksum.
            content: The step's tensors, as safetensors.
            offset: Where ``steps.data`` ends.
        """
        about = {"offset": offset, "bytes": len(content), "checksum": content_checksum(content)}
        written = nan_to_null({**line, **about})
        for path, new in ((self.data, content), (self.text, _text(written))):
            with path.open("ab") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
        return written

    def cut(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Truncate both files to these lines."""
        write_bytes(self.text, b"".join(map(_text, lines)))
        with self.data.open("ab") as file:
            file.truncate(end_of(lines))
            os.fsync(file.fileno())


def end_of(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return where the tensors of these lines end."""
    return lines[-1]["offset"] + lines[-1]["bytes"] if lines else 0


def content_checksum(content: bytes) -> str:
    """Return a hash of some bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _text(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()
