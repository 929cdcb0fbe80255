"""What an editor keeps from the program around it: messages of libraries, and that a Trainer would leave it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from prune_lightning.tasks.setup import quieten


@contextmanager
def quiet() -> Iterator[None]:
    """Hide, inside the block, what libraries say about training and loading."""
    lightning, level = logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.pytorch").level
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quieten()
        try:
            yield
        finally:
            lightning.setLevel(level)
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.logging.enable_progress_bar()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise, inside the block, the interrupt itself where a Trainer would leave the program."""
    try:
        yield
    except SystemExit as left:
        if isinstance(left.__context__, KeyboardInterrupt):
            raise left.__context__ from None
        raise
