"""Memories that decide on each prompt at one module of the model, before anything that they change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prune_lightning.devices import on_device
from prune_lightning.methods.side_memory import SideMemory
from prune_lightning.models.batching import TOKEN_BUDGET, by_length
from prune_lightning.models.hooks import Recorder, apart, capture, hidden_states
from prune_lightning.models.prompt_memory import Reading, WhichAnswered


class DecidingMemory(SideMemory):
    """Base of the memories that look at what a module makes of a prompt, and then answer it or leave it alone.

    What the module reads does not depend on the memory. So it can decide on prompts in passes of the model without it,
    in which they share their beginnings.

    Attributes:
        held: What was decided for each row when its prompt was read, for the passes that continue it.
    """

    held: Tensor | None = None

    @property
    @abstractmethod
    def witness(self) -> nn.Module:
        """The module."""

    @abstractmethod
    def decide(self, inputs: Tensor, outputs: Tensor, reading: Reading) -> Tensor:
        """Return how each prompt is answered, shape ``(rows, ...)``.

        Args:
            inputs: Of the module, shape ``(rows, length, in_features)``.
            outputs: Of the module, shape ``(rows, length, out_features)``.
            reading: Where the prompts are.
        """

    def answered(self, held: Tensor) -> Tensor:
        """Return which prompts are not left alone, shape ``(rows,)``: by default those with an entry's number."""
        return held >= 0

    def to(self, device: torch.device) -> SideMemory:
        """Move the state to a device, in place, and forget the latest pass."""
        self.held = self.language_model.reader.reading = None
        return super().to(device)

    def hooks(self) -> Iterator[Any]:
        """Decide at the module."""
        yield self.witness.register_forward_hook(self._decide)

    @torch.no_grad()
    def _decide(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reading = self.language_model.reader.reading
        assert reading is not None
        if reading.ends is not None:
            self.held = self.decide(apart(args[0], reading.rows), apart(hidden_states(output), reading.rows), reading)

    @contextmanager
    def watch(self, rows: int, stop: bool = False) -> Iterator[WhichAnswered]:
        """See the base class: what the module reads does not depend on the memory."""
        with capture([self.witness], [self.witness], stop, rows) as seen:
            yield partial(self._which_answered, seen)

    @torch.no_grad()
    def _which_answered(self, seen: Recorder, rows: Sequence[int], paths: Sequence[Sequence[int]]) -> list[bool]:
        """Decide on prompts whose tokens are anywhere in the rows of a pass."""
        number: dict[tuple[int, ...], int] = {}  # of each prompt; those with several answers are decided on once
        of_path = [number.setdefault((at, *path), len(number)) for at, path in zip(rows, paths, strict=True)]
        distinct, found = list(number), [False] * len(number)
        for group in by_length([len(path) for path in distinct], TOKEN_BUDGET):
            padded = pad_sequence(on_device([distinct[i] for i in group], self.device), batch_first=True)
            row, places = padded[:, :1], padded[:, 1:]
            lengths = torch.tensor([len(distinct[i]) - 1 for i in group], device=self.device)
            real = torch.arange(places.shape[1], device=self.device) < lengths[:, None]
            # A row for each prompt again; what is behind its end is arbitrary.
            inputs, outputs = (value[row, places] for value in (seen.inputs[0], seen.outputs[0]))
            answered = self.answered(self.decide(inputs, outputs, Reading(real, lengths - 1)))
            # A prompt that breaks makes those of its row NaN, too: each has to be read by itself.
            broken = ~(inputs.isfinite().all(-1) & outputs.isfinite().all(-1)) & real
            for i, one in zip(group, (answered | broken.any(1)).tolist(), strict=True):
                found[i] = one
        return [found[i] for i in of_path]
