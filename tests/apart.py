"""A pretended accelerator: tensors that compute on the CPU, but live apart from it as those of a GPU do.

An operation on tensors of both devices raises, as on a GPU, and so does handing the tensors to a library that reads
memory. Random numbers may not be drawn on it, since a GPU's are not the CPU's. Operations for which a GPU would have to
finish its queue first, such as ``.item()``, are counted with the line that asked for them. The device's type is
``lazy``, which nothing else uses.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

DEVICE = torch.device("lazy")
# Their result's size, or what they raise, depends on values.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::_linalg_check_errors",
    "aten::linalg_eigvalsh",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
ACROSS = {"aten::_to_copy", "aten::copy_"}
JOINING = {"aten::cat", "aten::stack"}  # which take no number of the CPU either


class ApartTensor(Tensor):
    """A tensor of the pretended device; ``held`` holds its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> ApartTensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ApartTensor({self.held})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended device is used outside of it")


def _held_by(value: Any) -> Any:
    return value.held if isinstance(value, ApartTensor) else value


def is_list(value: Any) -> bool:
    """Whether a part of an index is a list, which PyTorch makes a tensor of."""
    return isinstance(value, list)


def _as_index(places: list) -> Tensor:
    return torch.tensor(places, dtype=None if places else torch.long).to(DEVICE)


class _Python(TorchFunctionMode):
    """Does in two steps what PyTorch would ask the backend for before it asks a mode."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and isinstance(args[0], list):
            args = ([item.item() if isinstance(item, ApartTensor) else item for item in args[0]],)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], ApartTensor):
            return torch.tensor(args[1], **({"dtype": args[0].dtype} | kwargs)).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], ApartTensor):
            args = (args[0], tree_map_only(list, _as_index, args[1], is_list), *args[2:])
        if func is Tensor.__setitem__ and isinstance(args[2], (int, float)):
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        if func is Tensor.tolist:
            args = (args[0].cpu(),)
        return func(*args, **kwargs)


class Apart(TorchDispatchMode):
    """Makes the device available inside the block.

    Attributes:
        waits: What a GPU would have waited for: the operation and the line of the package, or else the last line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self._python = _Python()

    def __enter__(self) -> Apart:
        self._python.__enter__()
        self._autocast = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda *of: False if of == (DEVICE.type,) else self._autocast(*of)
        torch.lazy = SimpleNamespace(get_rng_state=lambda device: torch.get_rng_state(), set_rng_state=lambda *_: None)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._python.__exit__(*raised)
        del torch.lazy
        torch.is_autocast_enabled = self._autocast

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, ApartTensor)]
        if not here and torch.device(kwargs.get("device") or "cpu") != DEVICE:
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
            raise RuntimeError(f"{name}: random numbers are drawn on the device, where a seed means something else")
        self._check(name, args, tensors, kwargs)
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(_held_by, args), **tree_map(_held_by, kwargs))
        if name == "aten::copy_":
            return args[0]
        if target is not None and torch.device(target) != DEVICE:
            return result
        known = {id(tensor.held): tensor for tensor in here}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else ApartTensor(value)

        return tree_map(wrapped, result)

    def _check(self, name: str, args: Sequence, tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
        """Raise if devices are mixed; note what a GPU would wait for."""
        strange = [tensor for tensor in tensors if not isinstance(tensor, ApartTensor)]
        if name in ACROSS:
            leaves = isinstance(args[0 if name == "aten::_to_copy" else 1], ApartTensor)
            to = kwargs.get("device") if name == "aten::_to_copy" else getattr(args[0], "device", None)
            if leaves and to is not None and torch.device(to) != DEVICE:
                self._wait(name)
            return
        if name in INDEXING:
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            if not isinstance(args[0], ApartTensor):
                raise RuntimeError(f"{name}: a tensor on the CPU is indexed by one of the device")
            if any(index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu" for index in indices):
                self._wait(name)
            return
        if any(tensor.ndim or name in JOINING for tensor in strange):
            raise RuntimeError(f"{name}: expected all tensors on one device, but some are on the CPU")
        if name in WAITING or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            self._wait(name)

    def _wait(self, name: str) -> None:
        frames = traceback.extract_stack()[:-3]
        own = [f for f in frames if "/prune_lightning/" in f.filename or "/callbacks/" in f.filename]
        frame = (own or frames)[-1]
        self.waits.append((name, f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"))


class ApartAccelerator(CPUAccelerator):
    """Lets a Trainer run on the device."""

    def setup_device(self, device: torch.device) -> None:
        """Do nothing."""
