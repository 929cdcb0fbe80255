"""One step of an edit stream as data: what happened to each matrix, and what the method remembers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_lightning.methods.edited_matrix import MatrixEvent
from prune_lightning.types import DenseUpdate, LowRankUpdate, MatrixUpdate

_OBSERVED = "observed"
_KEPT_RANK = 4  # corrections up to so many times the rank of their step's update are kept


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Args:
        step: Number of the step, from 1.
        num_edits: Requests handled up to and including this step.
        requests: The step's requests, as plain data.
        applied: Whether the update was written.
        from_base: The unedited model was put back after the step.
        weights: Fingerprint of the edited weights after the step.
        callbacks: What callbacks have to say of the step, by their class's name; JSON-able.
        events: What happened to each matrix, in order, by the name of its weight.
        observed: What the method remembers of the step.
    """

    step: int
    num_edits: int
    requests: Sequence[Mapping[str, Any]]
    applied: bool = True
    from_base: bool = False
    weights: str | None = None
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, Sequence[MatrixEvent]] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)

    def flatten(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a JSON-able line and the tensors that it speaks of, on the CPU."""
        tensors = {f"{_OBSERVED}/{name}": _stored(tensor) for name, tensor in self.observed.items()}
        forms_by_name: dict[str, list[list[str]]] = {}
        line = {
            "step": self.step,
            "num_edits": self.num_edits,
            "applied": self.applied,
            "from_base": self.from_base,
            "requests": list(self.requests),
            "weights": self.weights,
            "callbacks": dict(self.callbacks),
            "events": forms_by_name,
        }
        for name, events in self.events.items():
            forms: list[list[str]] = []
            latest: MatrixUpdate | None = None
            for number, event in enumerate(events):
                form, parts = ("recomputed", {}) if _is_large(event, latest) else _pack(event.change, latest)
                forms.append([event.kind, form])
                tensors |= {f"{name}/{number}/{part}": _stored(tensor) for part, tensor in parts.items()}
                latest = event.change if event.kind == "add" else latest
            forms_by_name[name] = forms
        return line, tensors

    @classmethod
    def restore(cls, line: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> StepRecord:
        """Return what :meth:`flatten` took apart."""
        events: dict[str, list[MatrixEvent]] = {}
        for name, forms in line["events"].items():
            latest: MatrixUpdate | None = None
            events[name] = []
            for number, (kind, form) in enumerate(forms):
                start = f"{name}/{number}/"
                parts = {k.removeprefix(start): t.to(device) for k, t in tensors.items() if k.startswith(start)}
                change = _unpack(form, parts, latest)
                events[name].append(MatrixEvent(kind, change, recomputed=form == "recomputed"))
                latest = change if kind == "add" else latest
        start = f"{_OBSERVED}/"
        observed = {k.removeprefix(start): t.to(device) for k, t in tensors.items() if k.startswith(start)}
        plain = {
            key: line[key] for key in ("step", "num_edits", "requests", "applied", "from_base", "weights", "callbacks")
        }
        return cls(**plain, events=events, observed=observed)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _is_large(event: MatrixEvent, update: MatrixUpdate | None) -> bool:
    """Whether a correction would make the ledger grow faster than the stream.

    A spectral restraint takes away as many directions as exceed its reference, in the end as many as there are edits.
    It computes the same from the same change, so the correction is not kept then.
    """
    if event.kind == "add" or not isinstance(event.change, LowRankUpdate):
        return False
    known = update.left.shape[1] if isinstance(update, LowRankUpdate) else 1
    return event.change.left.shape[1] > _KEPT_RANK * known


def _pack(change: MatrixUpdate | None, update: MatrixUpdate | None) -> tuple[str, dict[str, Tensor]]:
    """Return the form in which a change is kept, and its tensors.

    Of a dense correction that takes away entries of the step's update as they are, only the places are kept, a bit
    each: ``entries``.
    """
    if change is None:
        return "nothing", {}
    if isinstance(change, LowRankUpdate):
        return "factors", {"left": change.left, "right": change.right}
    if update is not None:
        taken = change.matrix != 0
        if torch.equal(_entries(update, taken, change.matrix), change.matrix):
            bits = torch.from_numpy(np.packbits(taken.cpu().numpy()))
            return "entries", {"taken": bits, "like": change.matrix.new_empty(0)}
    return "dense", {"matrix": change.matrix}


def _unpack(form: str, parts: Mapping[str, Tensor], update: MatrixUpdate | None) -> MatrixUpdate | None:
    if form in ("nothing", "recomputed"):
        return None
    if form == "factors":
        return LowRankUpdate(parts["left"], parts["right"])
    if form == "dense":
        return DenseUpdate(parts["matrix"])
    assert update is not None
    like = update.dense()
    bits = np.unpackbits(parts["taken"].cpu().numpy(), count=like.numel())
    taken = torch.from_numpy(bits).view(like.shape).bool().to(like.device)
    return DenseUpdate(_entries(update, taken, parts["like"]))


def _entries(update: MatrixUpdate, taken: Tensor, like: Tensor) -> Tensor:
    return torch.where(taken, update.dense().to(like.dtype), 0)
