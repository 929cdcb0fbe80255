"""Moves tensors that are not parameters or buffers of a module to another device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Movable(Protocol):
    """An object with tensors that can be moved to a device."""

    def to(self, device: torch.device) -> Any:
        """Return the object on a device: itself, or a copy."""
        ...


def to_device(value: Any, device: torch.device) -> Any:
    """Return a value with its tensors on a device; dtypes are unchanged.

    Handles dicts, lists, tuples and objects with a method ``to``. Parameters and modules are returned unchanged, since
    they move with their parent module, and so are containers in which nothing moves.

    >>> to_device({"a": [torch.zeros(2)], "b": 1}, torch.device("meta"))
    {'a': [tensor(..., device='meta', size=(2,))], 'b': 1}
    """
    if isinstance(value, (nn.Parameter, nn.Module, type)):
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (dict, list, tuple):
        items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        moved = [(key, to_device(item, device)) for key, item in items]
        if all(new is old for (_, old), (_, new) in zip(items, moved, strict=True)):
            return value
        return dict(moved) if isinstance(value, dict) else type(value)(item for _, item in moved)
    return value.to(device) if isinstance(value, Movable) else value


def move_attributes(module: nn.Module, device: torch.device) -> None:
    """Move the plain attributes of a module, which ``module.to`` ignores, to a device."""
    of_torch = vars(nn.Module())
    for name, value in list(vars(module).items()):
        if name not in of_torch and (moved := to_device(value, device)) is not value:
            setattr(module, name, moved)
