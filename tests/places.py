"""Where a test runs: a GPU, or a pretended one, for those that are to show mistakes on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from apart import DEVICE, Apart, ApartAccelerator
from conftest import quiet_trainer
from lightning.pytorch.strategies import SingleDeviceStrategy


@dataclass(frozen=True)
class Place:
    """A device, and how a Trainer is told of it."""

    name: str

    @property
    def device(self) -> torch.device:
        return DEVICE if self.name == "apart" else torch.device("cuda", 0)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Make the device available, and yield what counts its waits, if there is such."""
        with Apart() if self.name == "apart" else nullcontext() as found:
            yield found

    def settings(self) -> dict[str, Any]:
        """Return the arguments of a Trainer that runs there."""
        if self.name == "apart":
            return {"accelerator": "auto", "strategy": SingleDeviceStrategy(DEVICE, accelerator=ApartAccelerator())}
        return {"accelerator": "gpu", "devices": 1}

    def trainer(self, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
        """Return a quiet Trainer."""
        return quiet_trainer(*callbacks, **self.settings(), **kwargs)


APART = pytest.param(Place("apart"), id="apart")
GPU = pytest.param(Place("cuda"), id="cuda", marks=pytest.mark.gpu)
