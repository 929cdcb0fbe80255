"""One job per run folder: a lock that is taken before anything is written into the folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from typing_extensions import override

FILE = ".lock"
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in the order in which Lightning reads them


class RunLock(Callback):
    """Holds a lock on the folder of a run, and on that of a sweep, while a job runs in it.

    The lock belongs to the process. The operating system releases it when the process ends, however it ends. Processes
    of a distributed run other than the first share its folder and take no lock.

    Hydra creates the folder of a run and writes ``.hydra/`` and the log before it starts the job, so the lock is taken
    when the run starts. A job of a sweep may run in a process of its own and locks its folder too.
    """

    def __init__(self) -> None:
        self._held: list[FileLock] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what goes to a process of a launcher: no lock, since locks belong to the process that holds them."""
        return {"_held": []}

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Lock the folder of a run."""
        self._lock(config.hydra.run.dir, "hydra.run.dir")

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Lock the folder of a sweep."""
        self._lock(config.hydra.sweep.dir, "hydra.sweep.dir")

    @override
    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Lock the folder of a job; that of a run is held already."""
        self._lock(config.hydra.runtime.output_dir, "hydra.run.dir")

    @override
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Release the folder of a job."""
        self._release()

    @override
    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Release the folder of a run."""
        self._release()

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Release the folder of a sweep."""
        self._release()

    def _lock(self, folder: str, setting: str) -> None:
        if next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0):
            return
        path = Path(folder).resolve()
        try:
            path.mkdir(parents=True, exist_ok=True)
            # A singleton is the same lock wherever this process asks for the folder, and counts how often.
            lock = FileLock(path / FILE, is_singleton=True)
            lock.acquire(blocking=False)
        except Timeout:
            _refuse(f"another job runs in {folder!r}: wait until it ends, or choose another folder by {setting}=...")
        except NotImplementedError:  # the file system has no locks
            return
        except OSError as error:
            _refuse(f"the folder {folder!r} cannot be written ({error.strerror}): choose another by {setting}=...")
        self._held.append(lock)

    def _release(self) -> None:
        if self._held:
            self._held.pop().release()


def _refuse(reason: str) -> NoReturn:
    """Exit with 2. Hydra turns what a callback raises into a warning, but lets ``SystemExit`` pass."""
    sys.stderr.write(f"error: {reason}\n")
    sys.exit(2)
