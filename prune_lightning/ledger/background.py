"""Writes to the disk in the background, one at a time, so that a run does not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundWriter:
    """Runs one write at a time in a thread of its own.

    The interpreter waits for the thread before it exits, so a write is completed unless the process is killed.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._latest: Future[Any] | None = None

    def start(self, write: Callable[[], Any]) -> None:
        """Start a write after the previous one.

        Args:
            write: Writes what nobody else changes meanwhile.

        Raises:
            Exception: The error of the previous write; the new one is not started.
        """
        self.wait()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._latest = self._executor.submit(write)

    def wait(self) -> None:
        """Wait for the write that was started last.

        Raises:
            Exception: Its error, once.
        """
        if self._latest is None:
            return
        try:
            self._latest.result()
        finally:
            if self._latest.done():  # otherwise the wait was interrupted
                self._latest = None
