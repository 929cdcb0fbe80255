"""One step of an edit stream as data: the events of each edited part, and the method's memory of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from prune_lightning.ledger.events import flatten_events, restore_events, stored
from prune_lightning.ledger.sketch import MatrixSketch
from prune_lightning.methods.edited_part import Event

_OBSERVED = "observed"


@dataclass(frozen=True)
class StepRecord:
    """The record of one step.

    Args:
        step: Number of the step, from 1.
        num_requests: Requests handled up to and including this step.
        requests: The step's requests, as plain data.
        applied: Whether the update was written.
        from_base: Whether the unedited model was restored after the step.
        sketch: Sketch of the edited weights after the step, for comparison; see :class:`~.sketch.StateSketch`.
        callbacks: The callbacks' state of the step, by the callback's name; JSON-serializable.
        events: The events of each edited part, in order, by its name.
        observed: The method's memory of the step.
    """

    step: int
    num_requests: int
    requests: Sequence[Mapping[str, Any]]
    applied: bool = True
    from_base: bool = False
    sketch: Mapping[str, MatrixSketch] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, Sequence[Event]] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)

    def flatten(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a JSON-able line and the tensors that it speaks of, on the CPU."""
        tensors = {f"{_OBSERVED}/{name}": stored(tensor) for name, tensor in self.observed.items()}
        forms, parts = flatten_events(self.events)
        line = {
            "step": self.step,
            "num_requests": self.num_requests,
            "applied": self.applied,
            "from_base": self.from_base,
            "requests": list(self.requests),
            "sketch": {name: asdict(sketch) for name, sketch in self.sketch.items()},
            "callbacks": dict(self.callbacks),
            "events": forms,
        }
        return line, tensors | parts

    @classmethod
    def restore(cls, line: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> StepRecord:
        """Return what :meth:`flatten` took apart."""
        events = restore_events(line["events"], tensors, device)
        start = f"{_OBSERVED}/"
        observed = {k.removeprefix(start): t.to(device) for k, t in tensors.items() if k.startswith(start)}
        plain = {key: line[key] for key in ("step", "num_requests", "requests", "applied", "from_base", "callbacks")}
        return cls(**plain, sketch=sketches(line), events=events, observed=observed)


@dataclass(frozen=True)
class FinishRecord:
    """The record of the end of the stream, at which restraints process what is pending.

    Args:
        step: Number of the last step.
        sketch: See :class:`StepRecord`; of the final weights.
        callbacks: See :class:`StepRecord`.
        events: The events of each edited part.
    """

    step: int
    sketch: Mapping[str, MatrixSketch] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, Sequence[Event]] = field(default_factory=dict)

    def flatten(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a JSON-able line and the tensors that it speaks of, on the CPU."""
        forms, tensors = flatten_events(self.events)
        sketch = {name: asdict(sketch) for name, sketch in self.sketch.items()}
        return {"step": self.step, "sketch": sketch, "callbacks": dict(self.callbacks), "events": forms}, tensors

    @classmethod
    def restore(cls, line: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> FinishRecord:
        """Return what :meth:`flatten` took apart."""
        events = restore_events(line["events"], tensors, device)
        return cls(line["step"], sketches(line), line["callbacks"], events)


def sketches(line: Mapping[str, Any]) -> dict[str, MatrixSketch]:
    """Return the sketches of a line by the name of the matrix; ``null`` stands for a non-finite number."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return {
        name: MatrixSketch(tuple(map(number, plain["products"])), number(plain["change_norm"]))
        for name, plain in line["sketch"].items()
    }
