"""Models that are divided: FSDP2 gives each process a part of every weight, a tensor of type ``DTensor``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from prune_lightning.distributed import take_first, world_size
from prune_lightning.errors import UserError


def is_sharded(module: nn.Module) -> bool:
    """Whether some of a module's parameters are divided among processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded; then all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, live: Tensor) -> Tensor:
    """Return a whole tensor, sharded as ``live`` is: the first process's, on all of them."""
    if not isinstance(live, DTensor):
        return tensor
    return distribute_tensor(tensor.contiguous(), live.device_mesh, live.placements)


@contextmanager
def writing(tensor: Tensor) -> Iterator[Tensor]:
    """Yield what the tensor is to become: itself, or, if it is sharded, a whole one that is divided after the block."""
    if not isinstance(tensor, DTensor):
        yield tensor
        return
    result = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    yield result
    tensor.copy_(sharded_like(result, tensor))


def shard(model: nn.Module, blocks: Iterable[nn.Module], device_type: str) -> None:
    """Divide a model among all processes in place. What runs gathers one block at a time; the rest is one more part.

    Args:
        model: The model, whole on every process.
        blocks: Its transformer blocks.
        device_type: ``cuda`` or ``cpu``; the parts are moved to this process's device of that type.
    """
    mesh = init_device_mesh(device_type, (world_size(),))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)


@contextmanager
def logits_of_first(model: nn.Module) -> Iterator[None]:
    """Inside the block, a sharded model gives every process the logits of the first; use it around decoding.

    The processes compute the same logits up to rounding. What is decided by them, such as the next token and so the
    end of a text, has to be the same on all: each takes part in the passes of the others.

    Args:
        model: A ``transformers`` model, without gradients.
    """
    if not is_sharded(model):
        yield
        return

    def first(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        take_first(logits)
        return logits

    head: nn.Module = cast(Any, model).get_output_embeddings()
    handle = head.register_forward_hook(first)
    try:
        yield
    finally:
        handle.remove()


def refuse_device_map(model: nn.Module) -> None:
    """Raise an error if ``accelerate`` has put the layers of a model on several devices.

    Hooks then move what the model computes from device to device. Edits compute outside of the model, too.

    Raises:
        UserError: It has; the message says what to use.
    """
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise UserError(
            f"the model was loaded with a device_map over {', '.join(devices)}; load it on one device, or without a "
            "device_map for trainer=fsdp2 (`ModelParallelStrategy`), which divides it among the devices"
        )
