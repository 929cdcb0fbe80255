"""One edited weight matrix: its original, the accumulated change in full precision, and the live weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from prune_lightning.devices import to_device
from prune_lightning.fingerprint import fingerprint
from prune_lightning.methods.edited_part import EditedPart, Event
from prune_lightning.models.family import stores_transposed
from prune_lightning.sharding import sharded_like, whole, writing
from prune_lightning.spectral import AccumulatedChange
from prune_lightning.spectral.triplets import fp64
from prune_lightning.types import DenseUpdate, LowRankUpdate, MatrixUpdate, MemoryUpdate, Update


class EditedMatrix(EditedPart):
    r"""Keeps :math:`W = W_0 + \Delta - A B^\top`: the sum of the updates minus what a restraint withholds.

    The change is kept in fp32 at least and cast to the weight's dtype once per write. All matrices are handled as
    ``out_features x in_features``; a ``Conv1D`` weight is transposed on reading and writing.

    A sharded weight and its original stay sharded. Each is gathered while it is read, by all processes together, and
    the weight that the first process computes is divided again. The change is whole on every process.

    Args:
        name: Qualified name of the weight.
        parameter: The live weight.
        transposed: Whether the weight is stored ``in x out``.

    Attributes:
        change: :math:`\Delta`, the sum of the updates, less what a restraint has subtracted.
        withheld: :math:`A B^\top`, or a dense matrix, or ``None``.
        feeds_back: Whether :meth:`withheld_on` counts what is withheld.
        journal: The events of this step, in order.
    """

    def __init__(self, name: str, parameter: nn.Parameter, transposed: bool) -> None:
        self.name, self.parameter, self.transposed = name, parameter, transposed
        self._module: nn.Module | None = None
        self._original = parameter.detach().clone()
        self.feeds_back = False
        self._start()

    @classmethod
    def of(cls, name: str, module: nn.Module) -> EditedMatrix:
        """Return the matrix of a Linear or Conv1D."""
        matrix = cls(name, cast(nn.Parameter, module.weight), stores_transposed(module))
        matrix._module = module
        return matrix

    def _start(self) -> None:
        self.journal = []
        self.change = AccumulatedChange(self.original())
        self.withheld: MatrixUpdate | None = None
        self._last: MatrixUpdate | None = None

    def to(self, device: torch.device) -> EditedMatrix:
        """Move the state to the device of the live weight, in place."""
        if self._module is not None:
            self.parameter = cast(nn.Parameter, self._module.weight)  # some backends make new ones
        # The model may have been sharded in the meantime.
        self._original = sharded_like(whole(self._original.to(device)), self.parameter.detach())
        self.change = self.change.to(device)
        self.withheld, self._last = to_device((self.withheld, self._last), device)
        self.journal = [replace(event, change=to_device(event.change, device)) for event in self.journal]
        return self

    @property
    def device(self) -> torch.device:
        """Device of the live weight."""
        return self.parameter.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the change."""
        return self.change.master.numel() * self.change.master.element_size()

    @property
    def exact(self) -> bool:
        """Whether the updates restore the weight bit for bit: nothing is withheld."""
        return self.withheld is None

    def _turned(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def original(self) -> Tensor:
        """Return the original matrix."""
        return self._turned(whole(self._original))

    def weight(self) -> Tensor:
        """Return the live weight."""
        return self._turned(whole(self.parameter.detach()))

    def delta(self) -> Tensor:
        """Return the change of the live weight, before the cast to the weight's dtype."""
        delta = torch.empty_like(self.change.master)
        self.change.write(delta, correction=self.withheld)
        return delta

    def begin_step(self) -> None:
        """Clear the events of the previous step."""
        self._last, self.journal = None, []

    def step(self) -> Tensor:
        """Return the update of this step as computed; zero if none was written."""
        step = torch.zeros_like(self.change.master)
        if self._last is not None:
            self._last.add_to(step)
        return step

    def check(self, update: Update) -> None:
        """Raise a ``ValueError`` if an update has another shape."""
        expected = tuple(self.change.master.shape)
        shape = tuple(update.shape) if isinstance(update, (LowRankUpdate, DenseUpdate)) else type(update).__name__
        if shape != expected:
            raise ValueError(f"expected an update of shape {expected} for {self.name}, but got {shape}")

    def can_hold(self, update: Update) -> bool:
        """Whether an update is finite, also in the weight's dtype."""
        return update.norm() < torch.finfo(self.parameter.dtype).max  # not for one that is NaN

    def add(self, update: Any) -> None:
        """Add an update of the matrix and write the weight."""
        self._do(Event("add", update))

    def withhold(self, correction: LowRankUpdate | None) -> None:
        """Write the weight without ``correction``; the sum of the updates does not change."""
        if correction is not None or self.withheld is not None:
            self._do(Event("withhold", correction))

    def drop(self, entries: Tensor) -> None:
        """Withhold entries of :meth:`step_with_withheld`, in place of what was withheld before the step.

        Args:
            entries: Mask, ``out_features x in_features``.
        """
        self._do(Event("drop", DenseUpdate(entries)))

    def step_with_withheld(self) -> Tensor:
        """Return :meth:`step` plus what was withheld before it: the whole change that a restraint decides on."""
        return self.step() if self.withheld is None else self.step() + self.withheld.dense().to(self.change.master)

    def withheld_on(self, keys: Tensor) -> Tensor:
        """Return what a restraint with feedback withholds from the outputs; zero without feedback.

        Args:
            keys: Inputs of the matrix, shape ``(in_features, b)``.

        Returns:
            Shape ``(out_features, b)``, in the dtype of ``keys``.
        """
        if not self.feeds_back or self.withheld is None:
            return keys.new_zeros(len(self.change.master), keys.shape[1])
        return self.withheld.times(keys)

    @contextmanager
    def withholding(self, correction: LowRankUpdate | None) -> Iterator[None]:
        """Write the weight without ``correction`` inside the block, then restore it bit for bit."""
        before = self.withheld
        self.withheld = correction
        self.write()
        try:
            yield
        finally:
            self.withheld = before
            self.write()

    def subtract(self, correction: LowRankUpdate | Tensor) -> None:
        """Subtract ``correction`` from the change permanently and write the weight."""
        self._do(Event("subtract", DenseUpdate(correction) if isinstance(correction, Tensor) else correction))

    def _do(self, event: Event) -> None:
        if event.change is not None:  # one layout: what is read from the disk rounds in products as this does
            event = replace(event, change=event.change.contiguous())
        self._apply(event)
        self.journal.append(event)
        self.write()

    def _apply(self, event: Event) -> None:
        change = event.change
        assert not isinstance(change, MemoryUpdate)
        if event.kind == "withhold":
            self.withheld = change
        elif event.kind == "drop":
            assert isinstance(change, DenseUpdate)
            self.withheld = DenseUpdate(torch.where(change.matrix, self.step_with_withheld(), 0))
        elif event.kind == "add":
            assert change is not None
            self._last = change
            self.change.add(change)
        else:
            assert change is not None
            self.change.subtract(change.matrix if isinstance(change, DenseUpdate) else change)

    def replay(self, events: Iterable[Event]) -> None:
        """Repeat the events of an earlier step, bit for bit; call :meth:`write` afterwards to write the weight.

        Corrections that were not stored are left to the caller.
        """
        for event in events:
            if not event.recomputed:
                self._apply(event)

    def write(self) -> None:
        """Write the weight from the change and the withheld part."""
        with writing(self.parameter.detach()) as stored:
            self.change.write(self._turned(stored), self.original(), self.withheld)

    @torch.no_grad()
    def add_provisionally(self, update: MatrixUpdate) -> None:
        """Change the live weight only; the caller restores it (see ``EditingModule.provisional``)."""
        changed = torch.empty_like(self.change.master)
        self.change.write(changed, self.original(), self.withheld)
        update.add_to(changed)
        with writing(self.parameter.detach()) as stored:
            self._turned(stored).copy_(changed)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the original weight, bit for bit."""
        self._start()
        self.parameter.copy_(self._original)

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """Restore the weight, bit for bit, after the block."""
        saved = self.parameter.detach().clone()
        try:
            yield
        finally:
            with torch.no_grad():
                self.parameter.copy_(saved)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Inside the block the weight is the original one, afterwards as before, bit for bit."""
        with self.provisional():
            with torch.no_grad():
                self.parameter.copy_(self._original)
            yield

    def original_fingerprint(self) -> str:
        """Return the fingerprint of the original."""
        return fingerprint(self.original())

    def fingerprint(self) -> str:
        """Return the fingerprint of the live weight."""
        return fingerprint(self.weight())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the change, the withheld part and the weight, but not the original.

        The weight is stored because recomputing it need not give the same bits: a product of factors can round
        differently in another process.
        """
        state = {f"change.{name}": tensor for name, tensor in self.change.state_dict().items()}
        if isinstance(self.withheld, DenseUpdate):
            state["withheld.matrix"] = self.withheld.matrix
        elif self.withheld is not None:
            state |= {"withheld.left": self.withheld.left, "withheld.right": self.withheld.right}
        if self.withheld is not None:
            state["weight"] = self.weight()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a :meth:`state_dict` and write the weight, bit for bit."""
        self._start()
        part = "change."
        self.change.load_state_dict({n.removeprefix(part): t for n, t in state.items() if n.startswith(part)})
        if "withheld.left" in state:
            device = fp64(self.change.master[:0]).device
            self.withheld = LowRankUpdate(state["withheld.left"].to(device), state["withheld.right"].to(device))
        elif "withheld.matrix" in state:
            self.withheld = DenseUpdate(state["withheld.matrix"].to(self.change.master.device))
        if self.withheld is not None:
            with torch.no_grad(), writing(self.parameter.detach()) as stored:
                self._turned(stored).copy_(state["weight"])
        else:
            self.write()

    def rounding_loss(self) -> float:
        r"""Return the relative error of the cast, :math:`\|W - (W_0+\Delta)\|_F / \|\Delta\|_F`.

        It is zero for a zero change and for weights in full precision. In 16-bit weights it can exceed small updates.
        """
        if self.parameter.dtype == self.change.master.dtype:
            return 0.0
        delta = self.delta()
        lost = self.weight().to(delta) - self.original().to(delta) - delta
        lost_norm, norm = torch.stack([torch.linalg.matrix_norm(each) for each in (lost, delta)]).tolist()
        return lost_norm / norm if norm else 0.0
