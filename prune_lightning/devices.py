"""Moves tensors that are not parameters or buffers of a module to another device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_IN_CACHE = 2**18
_PER_LAUNCH = 2**26


@runtime_checkable
class Movable(Protocol):
    """An object with tensors that can be moved to a device."""

    def to(self, device: torch.device) -> Any:
        """Return the object on a device: itself, or a copy."""
        ...


def rows_at_a_time(matrix: Tensor) -> int:
    """Return how many rows of a matrix to work on at a time, at least one.

    On a CPU a block of rows stays in the cache. Elsewhere each block costs launches of kernels, which take longer than
    the work on a small block, and a block of half a gigabyte bounds the memory for intermediate results.
    """
    entries = _IN_CACHE if matrix.device.type == "cpu" else _PER_LAUNCH
    return max(1, entries // max(1, matrix.shape[1]))


def on_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Return a tensor of each list of integers, copied to the device together.

    To a GPU they are copied from pinned memory, so that the host does not wait for what is queued there.

    >>> on_device([[1, 2], [3]], torch.device("cpu"))
    [tensor([1, 2]), tensor([3])]
    """
    flat = torch.tensor([value for values in lists for value in values], dtype=torch.long)
    flat = flat.pin_memory() if device.type == "cuda" else flat
    return list(flat.to(device, non_blocking=True).split([len(values) for values in lists]))


def in_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors that were read from a file.

    Those of a safetensors file lie where its header puts them, and others where PyTorch allocates memory, at multiples
    of 64 bytes. On some processors the products of equal matrices have other bits there.

    >>> in_own_memory({"a": torch.zeros(9)[1:]})["a"].data_ptr() % 64
    0
    """
    return {name: tensor.clone() for name, tensor in tensors.items()}


def chosen(mask: Tensor, count: int) -> Tensor:
    """Return the indices at which a mask is true, given their number.

    An index by the mask itself would have the host wait for the device, which only then knows how many there are.

    >>> chosen(torch.tensor([False, True, True]), 2)
    tensor([1, 2])
    """
    return (~mask).byte().argsort(stable=True)[:count]


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
