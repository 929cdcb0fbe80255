"""Snapshots of a run's whole state, the latest two of which are kept, to resume it bit for bit on any machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lightning.atomic_files import write_tensors
from prune_lightning.devices import in_own_memory
from prune_lightning.errors import UserError

KEPT = 2
_FINAL = "snapshot_final.safetensors"
_FIRST_GUESS = 100e6  # bytes a second, until a snapshot has been timed
_GRACE = 1.0  # seconds of waiting for the disk that a run may have at its beginning


@dataclass(frozen=True)
class Snapshot:
    """A file that holds the state after a step, or at the end of the stream.

    Args:
        path: The file.
        step: Number of the step.
        final: Whether it holds the state after the stream was finished.
    """

    path: Path
    step: int
    final: bool = False


@dataclass(frozen=True)
class HeldState:
    """A copy of a state, to write it while the run goes on.

    Args:
        step: Number of the latest step.
        tensors: Copies of its tensors, on the CPU, by their path.
        plain: The other values.
        final: Whether the stream is finished.
    """

    step: int
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    final: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any], final: bool = False) -> HeldState:
        """Copy a value of ``EditRun.state_dict``."""
        tensors, plain = _flatten(state)
        held = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}
        return cls(state["num_steps"], held, plain, final)


class Snapshots:
    """The snapshots of a run.

    Args:
        folder: The ledger's folder.

    Attributes:
        seconds: How long the latest one took to write; ``None`` before that.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: float | None = None

    def found(self) -> list[Snapshot]:
        """Return the snapshots of steps, oldest first."""
        paths = sorted(self.folder.glob("snapshot_[0-9]*.safetensors"))
        return [Snapshot(path, int(path.stem.split("_")[1])) for path in paths]

    def final(self) -> Snapshot | None:
        """Return the snapshot of the end of the stream, or ``None``."""
        path = self.folder / _FINAL
        if not path.exists():
            return None
        try:
            return Snapshot(path, int(_header(path)["step"]), final=True)
        except (SafetensorError, OSError, KeyError, ValueError):
            return None

    def write(self, state: HeldState) -> int:
        """Write a state, delete all but the latest two, and return its size in bytes.

        Raises:
            OSError: The disk is full, or the folder cannot be written; earlier snapshots are untouched.
        """
        start = time.monotonic()
        about = {"step": str(state.step), "state": json.dumps(state.plain), "checksum": checksum(state.tensors)}
        path = self.folder / (_FINAL if state.final else f"snapshot_{state.step:08d}.safetensors")
        write_tensors(path, state.tensors, about)
        for old in self.found()[:-KEPT]:
            old.path.unlink()
        self.seconds = time.monotonic() - start
        return sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())

    def expected_seconds(self, size: int) -> float:
        """Return how long a snapshot of this many bytes takes to write, judging by the latest one."""
        return size / _FIRST_GUESS if self.seconds is None else self.seconds

    def cut(self, last: int) -> None:
        """Delete the snapshots after a step, and that of the end."""
        for snapshot in self.found():
            if snapshot.step > last:
                snapshot.path.unlink()
        (self.folder / _FINAL).unlink(missing_ok=True)

    def load(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return a state.

        Raises:
            UserError: The file is damaged.
        """
        try:
            with safe_open(snapshot.path, framework="pt") as file:
                about = file.metadata()
                tensors = in_own_memory({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
            whole = checksum(tensors) == about["checksum"]
            plain = json.loads(about["state"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{snapshot.path} is damaged: {error}") from error
        if not whole:
            raise UserError(f"{snapshot.path} is damaged: its checksum does not match")
        return _restored(tensors, plain)

    def newest(self, last: int, final: bool) -> tuple[Snapshot, dict[str, Any]] | None:
        """Return the newest intact snapshot up to a step and its state; damaged ones are skipped with a warning.

        Args:
            last: Largest step number.
            final: Whether the snapshot of the end of the stream may be returned.
        """
        end = self.final() if final else None
        candidates = [snapshot for snapshot in self.found() if snapshot.step <= last]
        for snapshot in ([end] if end and end.step == last else []) + candidates[::-1]:
            try:
                return snapshot, self.load(snapshot)
            except UserError as error:
                rank_zero_warn(f"{error}; an earlier state and the steps after it are used instead")
        return None


class SnapshotCadence:
    """Decides when a snapshot is due.

    Where the stored steps restore a state bit for bit, a snapshot only shortens the replay. It is due when writing it
    would take no more than a share of the run's time since the last one. Where they do not, a snapshot is due after
    each step, unless the run has had to wait for the disk for more than that share.

    Args:
        every_n: Steps between two snapshots, instead of that; ``None`` to decide by time.
        share: Largest share of the run's time.

    Raises:
        UserError: ``every_n`` is no number of steps.
    """

    def __init__(self, every_n: int | None = None, share: float = 0.01) -> None:
        if every_n is not None and (not isinstance(every_n, int) or every_n < 1):
            raise UserError(f"snapshot_every is expected to be a number of steps or null, but got {every_n!r}")
        self.every_n, self.share = every_n, share
        self._begin = self._last = time.monotonic()
        self._waited = 0.0

    def due(self, step: int, seconds: float, exact: bool) -> bool:
        """Whether a snapshot is due.

        Args:
            step: Number of the latest step.
            seconds: How long a snapshot takes to write.
            exact: Whether the stored steps restore the state bit for bit.
        """
        now = time.monotonic()
        if self.every_n is not None:
            return step % self.every_n == 0
        if not exact:
            return self._waited <= _GRACE + (now - self._begin) * self.share
        return (now - self._last) * self.share >= seconds

    def taken(self) -> None:
        """Count the seconds since the last snapshot from now on."""
        self._last = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as time that the run waits."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and values, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a nested state by their path, and the other values."""
    tensors = {f"parts/{name}/{key}": tensor for name, held in state["parts"].items() for key, tensor in held.items()}
    tensors |= {f"memory/{name}": tensor for name, tensor in state["memory"].items()}
    plain = {key: value for key, value in state.items() if key not in ("parts", "memory")}
    return tensors, {**plain, "names": list(state["parts"])}


def _restored(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in plain["names"]}
    memory = {}
    for path, tensor in tensors.items():
        kind, _, rest = path.partition("/")
        if kind == "memory":
            memory[rest] = tensor
        else:
            name, _, key = rest.rpartition("/")
            parts[name][key] = tensor
    return {**{key: value for key, value in plain.items() if key != "names"}, "parts": parts, "memory": memory}
