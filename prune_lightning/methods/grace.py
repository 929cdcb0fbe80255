"""GRACE: a codebook of replaced outputs at one layer (Hartvigsen et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import one_of
from prune_lightning.methods.codebook import FILL, NONE, Codebook, Placement
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.deciding_memory import DecidingMemory
from prune_lightning.methods.module_memory import ModuleMemoryEditor
from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.methods.tuning_problem import logits_of_output
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import apart, capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.ranges import Count, Positive, Whole
from prune_lightning.types import EditRequest, MemoryUpdate
from prune_lightning.value_types import check_values

STARTS = ("cold", "warm")
PLACES = ("last", "prompt", "all")


class CodebookMemory(DecidingMemory):
    """A codebook on a linear module: prompts near a key get that key's value as the module's output.

    Args:
        name: Path of the module.
        language_model: The model.
        radius: Radius of a new entry.
        place: Tokens whose output is replaced, see :class:`GRACE`.
    """

    def __init__(self, name: str, language_model: LanguageModel, radius: float, place: str) -> None:
        self.host = language_model.model.get_submodule(name)
        self.radius, self.place = radius, place
        super().__init__(name, language_model)

    @property
    def precision(self) -> float:
        """Relative error of a key; see :func:`prune_lightning.export.verify.tolerance` for the exponent."""
        return float(torch.finfo(cast(Tensor, self.host.weight).dtype).eps ** (2 / 3))

    def clear(self) -> None:
        """Forget all entries."""
        weight = cast(Tensor, self.host.weight).detach()
        outputs, inputs = weight.T.shape if stores_transposed(self.host) else weight.shape
        self.book = Codebook.empty(inputs, outputs, weight)

    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the edits of a step, one after another."""
        for key, value, label in zip(tensors["keys"], tensors["values"], tensors["labels"], strict=True):
            self.book, _ = self.book.with_entry(key, value, label, self.radius, self.precision)

    def contents(self) -> dict[str, Tensor]:
        """Return the codebook."""
        return self.book.tensors()

    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace the codebook."""
        self.book = Codebook(**contents)

    def __len__(self) -> int:
        return len(self.book)

    @property
    def witness(self) -> nn.Module:
        """The module itself."""
        return self.host

    def decide(self, inputs: Tensor, outputs: Tensor, reading: Reading) -> Tensor:
        """Return the entry of each prompt, -1 for none, by the input at its last token."""
        assert reading.ends is not None
        return self.book.lookup(inputs[torch.arange(len(inputs), device=inputs.device), reading.ends])

    def hooks(self) -> Iterator[Any]:
        """Replace the module's output."""
        yield from super().hooks()
        yield self.host.register_forward_hook(self._replace)

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        reading = self.language_model.reader.reading
        assert reading is not None
        if reading.ends is None and self.place != "all":
            return None
        assert self.held is not None
        replaced = places(self.place, reading) & (self.held != NONE)[:, None]
        values = self.book.values[self.held.clamp_min(0)].to(output)
        return put(output, replaced, values)


def places(place: str, reading: Reading) -> Tensor:
    """Return the tokens whose output is replaced, shape ``(rows, length)``."""
    if place == "all":
        return reading.real
    return reading.at_end() if place == "last" else reading.before_end()


def put(output: Tensor, replaced: Tensor, values: Tensor) -> Tensor:
    """Return a module's output with one value per row at some of its tokens.

    Args:
        output: Shape ``(rows, length, width)``, or rows and tokens in one axis.
        replaced: Which tokens, shape ``(rows, length)``.
        values: Shape ``(rows, width)``.
    """
    whole = apart(output, len(values))
    return torch.where(replaced[..., None], values[:, None], whole).view(output.shape)


class GRACE(ModuleMemoryEditor):
    r"""Give prompts that are close to an edited one a trained output of one linear module.

    An edit adds an entry: the module's input :math:`k` at the prompt's last token, and a value :math:`v` in place of
    its output there, trained with Adam on the cross-entropy of the target. A prompt whose own input is within
    :math:`\epsilon_j` of its nearest key :math:`k_j` gets :math:`v_j`, and every other one is answered by the model as
    it is. This is decided once per prompt and holds for the whole answer. Radii grow and shrink as edits meet, see
    :meth:`.Codebook.with_entry`.

    The public code compares the means of label ids, which can be equal by chance; here the ids are compared. Requests
    that are written together are trained together, each as it would be alone.

    Args:
        language_model: The model to edit.
        layers: The block, one only.
        module: Name of the linear module in that block, e.g. ``c_fc``; ``None`` for the MLP's down-projection.
        radius: :math:`\epsilon` of a new entry.
        steps: Steps of Adam.
        learning_rate: Adam's learning rate.
        start: First value of a new entry: ``cold`` from the uniform distribution on [0, 1), or ``warm``, the module's
            output.
        place: Tokens whose output is replaced: the ``last`` one of the prompt, as in EasyEdit, those of the ``prompt``
            before it, as published, or ``all``.
        seed: Seed of the first values, combined with the number of earlier edits.
        fast: Run only the block and those above. The plain path computes the same from the whole model.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: Not one layer, no such module, or an option out of range.
    """

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        module: str | None = None,
        radius: Positive = 1.0,
        steps: Count = 100,
        learning_rate: Positive = 1.0,
        start: str = "cold",
        place: str = "last",
        seed: int = 0,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, module, **kwargs)
        check_values("method", Positive, radius=radius, learning_rate=learning_rate)
        check_values("method", Count, steps=steps)
        one_of("method.start", start, STARTS)
        one_of("method.place", place, PLACES)
        self.radius, self.steps, self.learning_rate = radius, steps, learning_rate
        self.start, self.place, self.seed, self.fast = start, place, seed, fast

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        module: str | None = None,
        steps: int = 100,
        **options: Any,
    ) -> Cost:
        """Return the costs: an entry per edit, and passes through the upper blocks."""
        outputs, inputs = cls.shape(model, layers, module)
        entry = float((inputs + outputs) * max(model.weight_size, 4))
        found = training_cost(
            model,
            stream,
            layers=layers,
            matrices=[],
            rank=0.0,
            trained=outputs * 4.0 * stream.batch,
            steps=steps,
            batch_size=stream.batch,
            at_output=module is None,
        )
        held = {"codebook": entry * stream.edits}
        return replace(found, memory={**found.memory, **held}, disk={"entries": entry * stream.edits})

    def new_memory(self) -> CodebookMemory:
        """Return an empty codebook."""
        return CodebookMemory(self.path, self.language_model, self.radius, self.place)

    # -- one edit -------------------------------------------------------------------------------------------------
    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MemoryUpdate], list[dict[str, Any]]]:
        """Return the keys, values and labels of the requests."""
        memory = self.side
        assert isinstance(memory, CodebookMemory)
        model = self.language_model
        pairs = model.tokens.encode_pairs([request.pair() for request in requests])
        ends = torch.tensor([pair.target_start - 1 for pair in pairs], device=model.device)
        labels = [torch.tensor(pair.target, device=model.device) for pair in pairs]
        with memory.unedited():
            batch = TargetBatch(model, requests, "target")
            keys, outputs = self._read(memory, batch, ends)
            first = self._first_values(outputs)
            entries, placements = self._placed(memory, keys, first, labels)
            values, losses = self._train(memory, batch, ends, entries, placements, first)
        strength = float((values - outputs.to(values)).norm())
        tensors = {"keys": keys, "values": values, "labels": pad_sequence(labels, True, FILL)}
        details = [
            {"placement": p.kind, "distance": p.distance, "steps": self.steps, "losses": of_request}
            for p, of_request in zip(placements, losses.T.tolist(), strict=True)
        ]
        return {memory.name: MemoryUpdate(tensors, strength)}, details

    @torch.no_grad()
    def _read(self, memory: CodebookMemory, batch: TargetBatch, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return the module's input and output at the end of each prompt, fp32 at least."""
        rows = torch.arange(len(ends), device=ends.device)
        with capture([memory.host], [memory.host], rows=len(ends)) as seen:
            self.language_model(batch.ids, batch.mask)
        return seen.inputs[0][rows, ends].to(memory.book.keys), seen.outputs[0][rows, ends].to(memory.book.keys)

    def _first_values(self, outputs: Tensor) -> Tensor:
        if self.start == "warm":
            return outputs.clone()
        generators = [torch.Generator().manual_seed(self.seed + self.run.num_requests + i) for i in range(len(outputs))]
        drawn = [torch.rand(outputs.shape[1], generator=each, dtype=outputs.dtype) for each in generators]
        return torch.stack(drawn).to(outputs.device)

    def _placed(
        self, memory: CodebookMemory, keys: Tensor, first: Tensor, labels: Sequence[Tensor]
    ) -> tuple[Tensor, list[Placement]]:
        """Return the first value of every entry as it will be, and where each request goes."""
        book, placements = memory.book, []
        for key, value, label in zip(keys, first, labels, strict=True):
            known = book
            book, placement = book.with_entry(key, value, label, self.radius, memory.precision)
            if placement.kind in ("expand", "inside"):  # training goes on from the entry's value
                book = replace(book, values=known.values)
            placements.append(placement)
        return book.values, placements

    def _train(
        self,
        memory: CodebookMemory,
        batch: TargetBatch,
        ends: Tensor,
        entries: Tensor,
        placements: Sequence[Placement],
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the value of each request, and the losses before each step, ``(steps, requests)``."""
        # A request whose key a later one of the step gives another label has no say in the value.
        last = {placement.entry: i for i, placement in enumerate(placements) if placement.kind == "replace"}
        counts = torch.tensor([i >= last.get(p.entry, 0) for i, p in enumerate(placements)], device=first.device)
        touched = sorted({placement.entry for placement in placements})
        of_request = torch.tensor([touched.index(p.entry) for p in placements], device=first.device)
        values = entries[touched].clone().requires_grad_()
        start = ends if self.place == "last" else None
        forward = logits_of_output(
            self.language_model, memory.host, self.layers[0], batch, "GRACE's values", self.fast, start
        )
        replaced = places(self.place, Reading(batch.mask.bool(), ends))
        optimizer, history = torch.optim.Adam([values], lr=self.learning_rate), []

        def change(output: Tensor) -> Tensor:
            return put(output, replaced, values[of_request].to(output))

        for _ in range(self.steps):
            with torch.enable_grad():
                losses = batch.losses(forward(change))
                optimizer.zero_grad()
                losses[counts].sum().backward()
            optimizer.step()
            history.append(losses.detach())
        return values.detach()[of_request], torch.stack(history)
