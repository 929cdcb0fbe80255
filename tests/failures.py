"""Plugin that writes each failure with its traceback at once: ``pytest -p failures``, with tests/ on the path.

A run that is cut off loses nothing of what it found. The file is ``FAILURES_TO``; without it, standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a failed phase of a test, once also under ``pytest-xdist``, whose workers report to the first process."""
    if not report.failed or "PYTEST_XDIST_WORKER" in os.environ:
        return
    text = f"FAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}\n\n"
    if "FAILURES_TO" in os.environ:
        with Path(os.environ["FAILURES_TO"]).open("a") as file:
            file.write(text)
    else:
        sys.__stderr__.write(text)
