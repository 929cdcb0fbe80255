"""How long callbacks take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning as L

from prune_lightning.methods.base import EditingModule

Hook = TypeVar("Hook", bound=Callable[..., None])


def part_of_phase(name: str) -> Callable[[Hook], Hook]:
    """Decorate a callback's hook: on editing modules its time is a part of the running phase, ``PHASE/name``."""

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def inside(self: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
            if not isinstance(pl_module, EditingModule):
                return hook(self, trainer, pl_module, *args, **kw)
            with pl_module.clock.part(name):
                return hook(self, trainer, pl_module, *args, **kw)

        return cast(Hook, inside)

    return decorate
