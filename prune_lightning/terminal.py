"""Filters the log for the terminal."""

from __future__ import annotations

import logging


class TerminalFilter(logging.Filter):
    """Passes warnings and, without a progress display, the run's own lines.

    Args:
        progress: Whether there is a progress display, which other lines would disturb.
    """

    def __init__(self, progress: bool) -> None:
        super().__init__("prune_lightning")
        self.progress = progress

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        return record.levelno >= logging.WARNING or (not self.progress and bool(super().filter(record)))
