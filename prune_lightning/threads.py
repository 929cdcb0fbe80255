"""How the threads of a process wait for one another."""

from __future__ import annotations

import os


def let_waiting_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says otherwise; before torch is imported.

    By default they spin. With another busy process on the machine, the threads that spin take the core from the one
    that they wait for, and an edit takes several times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
