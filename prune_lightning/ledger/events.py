"""Events of edited parts as data, each in the smallest form that can restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prune_lightning.methods.edited_part import Event
from prune_lightning.types import DenseUpdate, LowRankUpdate, MatrixUpdate, MemoryUpdate, Update

_KEPT_RANK = 4  # corrections up to this multiple of the rank of their step's update are stored


def flatten_events(
    events_by_name: Mapping[str, Sequence[Event]],
) -> tuple[dict[str, list[list[str]]], dict[str, Tensor]]:
    """Return the form in which each event is stored, and the tensors."""
    forms_by_name: dict[str, list[list[str]]] = {}
    tensors: dict[str, Tensor] = {}
    for name, events in events_by_name.items():
        forms: list[list[str]] = []
        latest: MatrixUpdate | None = None
        for number, event in enumerate(events):
            form, parts = ("recomputed", {}) if _is_large(event, latest) else _pack(event, latest)
            forms.append([event.kind, form])
            tensors |= {f"{name}/{number}/{part}": stored(tensor) for part, tensor in parts.items()}
            latest = event.change if event.kind == "add" and not isinstance(event.change, MemoryUpdate) else latest
        forms_by_name[name] = forms
    return forms_by_name, tensors


def restore_events(
    forms_by_name: Mapping[str, Sequence[Sequence[str]]], tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, list[Event]]:
    """Return the events from the values of :func:`flatten_events`."""
    events: dict[str, list[Event]] = {}
    for name, forms in forms_by_name.items():
        latest: MatrixUpdate | None = None
        events[name] = []
        for number, (kind, form) in enumerate(forms):
            start = f"{name}/{number}/"
            parts = {k.removeprefix(start): t.to(device) for k, t in tensors.items() if k.startswith(start)}
            change = _unpack(form, parts, latest)
            events[name].append(Event(kind, change, recomputed=form == "recomputed"))
            latest = change if kind == "add" and not isinstance(change, MemoryUpdate) else latest
    return events


def stored(tensor: Tensor) -> Tensor:
    """Return a tensor for storage, on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous()


def _is_large(event: Event, update: MatrixUpdate | None) -> bool:
    """Whether storing a correction would make the ledger grow faster than linearly with the stream.

    The rank of a spectral restraint's correction is the number of singular values above the reference, which can reach
    the number of edits. It can be recomputed from the same change, so it is not stored then.
    """
    if event.kind == "add" or not isinstance(event.change, LowRankUpdate):
        return False
    known = update.left.shape[1] if isinstance(update, LowRankUpdate) else 1
    return event.change.left.shape[1] > _KEPT_RANK * known


def _pack(event: Event, update: MatrixUpdate | None) -> tuple[str, dict[str, Tensor]]:
    """Return the form in which the change of an event is stored, and its tensors.

    If a dense correction equals some entries of the step's update, only their positions are stored, one bit each:
    ``entries``. Of a mask of entries these are all there is: ``mask``.
    """
    change = event.change
    if isinstance(change, MemoryUpdate):
        return "memory", dict(change.tensors)
    if event.kind == "drop":
        assert isinstance(change, DenseUpdate)
        return "mask", {"taken": _bits(change.matrix), "shape": torch.tensor(change.shape)}
    if change is None:
        return "nothing", {}
    if isinstance(change, LowRankUpdate):
        return "factors", {"left": change.left, "right": change.right}
    if update is not None:
        taken = change.matrix != 0
        if bool(((_step(update, change.matrix) == change.matrix) | ~taken).all()):
            return "entries", {"taken": _bits(taken), "like": change.matrix.new_empty(0)}
    return "dense", {"matrix": change.matrix}


def _unpack(form: str, parts: Mapping[str, Tensor], update: MatrixUpdate | None) -> Update | None:
    if form in ("nothing", "recomputed"):
        return None
    if form == "memory":
        return MemoryUpdate(parts)
    if form == "factors":
        return LowRankUpdate(parts["left"], parts["right"])
    if form == "dense":
        return DenseUpdate(parts["matrix"])
    if form == "mask":
        rows, columns = parts["shape"].tolist()
        return DenseUpdate(_mask(parts["taken"], (rows, columns)))
    assert update is not None
    return DenseUpdate(_step(update, parts["like"]).where(_mask(parts["taken"], update.shape), 0))


def _bits(taken: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(taken.cpu().numpy()))


def _mask(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    unpacked = np.unpackbits(bits.cpu().numpy(), count=shape[0] * shape[1])
    return torch.from_numpy(unpacked).view(shape).bool().to(bits.device)


def _step(update: MatrixUpdate, like: Tensor) -> Tensor:
    step = like.new_zeros(update.shape)
    update.add_to(step)
    return step
