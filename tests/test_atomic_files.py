"""Files are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prune_lightning.atomic_files import write_bytes, write_json, write_tensors


@contextmanager
def files_up_to(size):
    """Let no file grow beyond a size, as a full disk would."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = {
    "bytes": lambda path, size: write_bytes(path, b"x" * size),
    "json": lambda path, size: write_json(path, "x" * size),
    "tensors": lambda path, size: write_tensors(path, {"x": torch.zeros(size, dtype=torch.uint8)}),
}


def test_what_is_written_is_read_back(tmp_path):
    write_bytes(tmp_path / "a", b"\x00\r\n\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\r\n\xff"

    write_json(tmp_path / "a.json", {"a": [1.5, float("nan"), (float("inf"),)], "é": None})
    assert (tmp_path / "a.json").read_text("utf-8") == (
        '{\n  "a": [\n    1.5,\n    null,\n    [\n      null\n    ]\n  ],\n  "é": null\n}\n'
    )
    square = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"t": square.T.requires_grad_()}, {"about": "transposed"})
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")["t"], square.T, rtol=0, atol=0)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"about": "transposed"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.json", "a.safetensors"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(kind, tmp_path):
    path, write = tmp_path / "file", WRITERS[kind]
    write(path, 10)
    before = path.read_bytes()
    with files_up_to(4096), pytest.raises(OSError, match=r".") as caught:
        write(path, 10_000)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write(path, 10_000)
    assert path.stat().st_size >= 10_000


@pytest.mark.parametrize("kind", WRITERS)
def test_the_synced_handle_is_writable_and_the_rename_comes_last(kind, tmp_path, monkeypatch):
    """Windows refuses to sync a file that is open for reading only."""
    fcntl = pytest.importorskip("fcntl")
    steps, sync = [], os.fsync

    def spy(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        writable = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        steps.append("folder" if folder else f"writable={writable}, there={(tmp_path / 'file').exists()}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    WRITERS[kind](tmp_path / "file", 10)
    assert steps == ["writable=True, there=False", "folder"]


@pytest.mark.parametrize("kind", WRITERS)
def test_permissions_follow_the_umask(kind, tmp_path):
    (tmp_path / "plain").touch()
    WRITERS[kind](tmp_path / "file", 10)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
