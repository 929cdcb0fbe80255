"""Memories beside the weights, as a part of the model that edits change, and the base of the methods that have one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_lightning.devices import to_device
from prune_lightning.errors import UserError
from prune_lightning.fingerprint import sampled_fingerprint
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.edited_part import EditedPart, Event
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import PromptMemory
from prune_lightning.types import MemoryUpdate, Update


class SideMemory(EditedPart, PromptMemory):
    """A memory that changes the answers to some prompts. The weights stay as they are.

    Its state is a function of the updates so far, in order. The hooks are in the model only while there is something in
    the memory, so that an unedited model is just that.

    Args:
        name: Name of the memory, such as that of the module whose output it replaces.
        language_model: The model.
    """

    def __init__(self, name: str, language_model: LanguageModel) -> None:
        self.name, self.language_model = name, language_model
        self.journal = []
        self._handles: list[Any] = []
        self.clear()

    # -- what each memory writes for itself -----------------------------------------------------------------------
    @abstractmethod
    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of an update. Tensors of the state are replaced, not changed in place."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def contents(self) -> dict[str, Tensor]:
        """Return the state."""

    @abstractmethod
    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace the state by a value of :meth:`contents`."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of entries; zero if the model is the unedited one."""

    def hooks(self) -> Iterator[Any]:
        """Put what changes the answers into the model, and yield the handles."""
        yield from ()

    def merged(self) -> dict[str, Tensor]:
        """Return changes of weights, by name, with which every prompt is answered as those that the memory answers.

        For methods that are ``mergeable``.

        Returns:
            Each of shape ``(out_features, in_features)``.
        """
        raise NotImplementedError

    # -- a part of the model --------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.language_model.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.contents().values())

    @property
    def exact(self) -> bool:
        """Whether the updates restore the state bit for bit: always, since they are only collected."""
        return True

    def to(self, device: torch.device) -> SideMemory:
        """Move the state to a device, in place."""
        self.move(device)
        self.journal = [Event(event.kind, to_device(event.change, device)) for event in self.journal]
        return self

    def move(self, device: torch.device) -> None:
        """Move the tensors of the state to a device."""
        self.load(to_device(self.contents(), device))

    def check(self, update: Update) -> None:
        """Raise a ``ValueError`` for an update of a matrix."""
        if not isinstance(update, MemoryUpdate):
            raise ValueError(f"expected an update of the memory {self.name}, but got a {type(update).__name__}")

    def can_hold(self, update: Update) -> bool:
        """Whether an update is finite."""
        return update.is_finite()

    def begin_step(self) -> None:
        """Clear the events of the previous step."""
        self.journal = []

    def add(self, update: Any) -> None:
        """Add an update."""
        self._refuse_another()
        event = Event("add", update.contiguous())
        self.replay([event])
        self.journal.append(event)
        self.write()

    def replay(self, events: Iterable[Event]) -> None:
        """Add the updates of an earlier step."""
        for event in events:
            assert isinstance(event.change, MemoryUpdate)
            self.include(event.change.to(self.device).tensors)

    def write(self) -> None:
        """Put the hooks into the model if there is something in the memory, and take them out otherwise.

        Raises:
            UserError: The model has the memory of another editor.
        """
        model = self.language_model
        if not len(self):
            self._detach()
            return
        self._refuse_another()
        if model.memory is None:
            self._handles = [] if self.only_asks else [model.reader.attach(model.model), *self.hooks()]
            model.memory = self

    def _refuse_another(self) -> None:
        if self.language_model.memory not in (None, self):
            raise UserError("the model has the memory of another editor: undo its edits first, or load the model again")

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.language_model.memory is self:
            self.language_model.memory = None

    def restore(self) -> None:
        """Forget everything."""
        self.journal = []
        self.clear()
        self.write()

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """Restore the state after the block."""
        before = self.contents()
        try:
            yield
        finally:
            self.load(before)
            self.write()

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Inside the block the model is without the memory."""
        self._detach()
        try:
            yield
        finally:
            self.write()

    def original_fingerprint(self) -> str:
        """Return a fingerprint of all weights, from a sample of their entries."""
        return sampled_fingerprint(dict(self.language_model.model.named_parameters()))

    def fingerprint(self) -> str:
        """Return a fingerprint of the state, from a sample of its entries."""
        return sampled_fingerprint(self.contents())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""
        return self.contents()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state."""
        self.journal = []
        self.load(to_device(dict(state), self.device))
        self.write()


class MemoryEditor(EditingModule):
    """Base of the methods that write into a memory and leave the weights alone.

    A method implements :meth:`new_memory`, and :meth:`compute_update` with updates of that memory.
    """

    in_weights: ClassVar[bool] = False

    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return no modules: no weight is edited."""
        return {}

    @abstractmethod
    def new_memory(self) -> SideMemory:
        """Return an empty memory on the model."""

    def find_parts(self) -> Mapping[str, EditedPart]:
        """Return the memory."""
        memory = self.new_memory()
        return {memory.name: memory}

    @property
    def side(self) -> SideMemory:
        """The memory."""
        (memory,) = self.run.parts.values()
        assert isinstance(memory, SideMemory)
        return memory

    def summary(self) -> dict[str, Any]:
        """Return the number of edits, and the size of the memory among the facts."""
        size = {"memory_entries": float(len(self.side)), "memory_mb": self.side.num_bytes / 1e6}
        return {**super().summary(), "method_facts": {**self.facts, **size}}
