"""A memory of edits as text, each with the embedding of its prompt; another model answers what is in their scope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, compress
from typing import Any

import torch
from torch import Tensor, nn

from prune_lightning.methods.deciding_memory import DecidingMemory
from prune_lightning.methods.serac_networks import Entry, SERACNetworks, prompt_features
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading

NONE = -1


class ScopedMemory(DecidingMemory):
    """Edits with their embeddings. A prompt in the scope of the nearest one is answered by the counterfactual model.

    Args:
        language_model: The model.
        layer: The block whose output the classifier reads.
        networks: The trained networks.
        threshold: A prompt is in the scope of an edit if its score is above this.
    """

    def __init__(self, language_model: LanguageModel, layer: int, networks: SERACNetworks, threshold: float) -> None:
        self.layer, self.networks, self.threshold = layer, networks, threshold
        self._texts: list[list[int]] = []  # the tokens of each row, those of earlier passes first
        self._moved: Tensor | None = None  # where the first place of the present pass is in them
        super().__init__("edits", language_model)

    # -- the state ------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget all edits."""
        weight = self.networks.classifier.projection.weight
        self.keys, self.entries = weight.new_zeros(0, len(weight)), list[Entry]()

    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Add edits; a prompt that is known gets the later target."""
        for key, entry in zip(tensors["keys"], unpacked(tensors), strict=True):
            others = [i for i, known in enumerate(self.entries) if known.prompt != entry.prompt]
            self.entries = [*(self.entries[i] for i in others), entry]
            self.keys = torch.cat([self.keys[others], key[None].to(self.keys)])

    def contents(self) -> dict[str, Tensor]:
        """Return the embeddings, and the edits as token ids."""
        return {"keys": self.keys, **packed(self.entries, self.device)}

    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace the edits."""
        self.keys, self.entries = contents["keys"], unpacked(contents)

    def move(self, device: torch.device) -> None:
        """Move the embeddings to a device; token ids are no tensors here."""
        self.keys, self._moved = self.keys.to(device), None

    def __len__(self) -> int:
        return len(self.entries)

    # -- a prompt -------------------------------------------------------------------------------------------------
    def nearest(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest edit of each embedding, and the log of its score, shape ``(rows,)`` each."""
        # Differences, not products: the embedding of an edit's own prompt is at a distance of zero.
        distances = torch.cdist(embeddings, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        found = distances.min(1)
        return found.indices, -found.values.square()

    def routed(self, embeddings: Tensor) -> Tensor:
        """Return the edit that each embedding is in the scope of, -1 for none."""
        index, score = self.nearest(embeddings)
        return index.masked_fill(~(score.exp() > self.threshold), NONE)

    @property
    def witness(self) -> nn.Module:
        """The block."""
        return self.language_model.block(self.layer)

    def decide(self, inputs: Tensor, outputs: Tensor, reading: Reading) -> Tensor:
        """Return the edit that each prompt is in the scope of, -1 for none, by the block's output."""
        return self.routed(self.networks.classifier.eval()(prompt_features(outputs, reading)))

    def hooks(self) -> Iterator[Any]:
        """Read the tokens, decide at the block, and replace the logits."""
        model = self.language_model.model
        yield model.register_forward_pre_hook(self._read, with_kwargs=True)
        yield from super().hooks()
        yield model.register_forward_hook(self._answer)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the tokens of every row, and where the first place of this pass is in them."""
        reading = self.language_model.reader.reading
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("SERAC reads token ids, and there are none in this pass")
        assert reading is not None
        new = [list(compress(row, real)) for row, real in zip(ids.tolist(), reading.real.tolist(), strict=True)]
        if reading.ends is not None:
            self._texts, self._moved = new, -reading.real.int().argmax(1)
        else:
            self._moved = torch.tensor([len(text) for text in self._texts], device=ids.device)
            self._texts = [[*text, *more] for text, more in zip(self._texts, new, strict=True)]

    @torch.no_grad()
    def _answer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put the counterfactual model's logits in the place of those of the rows in scope."""
        assert self.held is not None
        assert self._moved is not None
        held = self.held.tolist()
        inside = [row for row, entry in enumerate(held) if entry != NONE]
        if not inside:
            return None
        where, rows, positions = self._places(output.logits)
        entries = [self.entries[held[row]] for row in inside]
        number = torch.full_like(self.held, NONE)
        number[inside] = torch.arange(len(inside), device=self.held.device)
        at = positions + self._moved[rows]
        chosen = (number[rows] != NONE) & (at >= 0)
        found = self.networks.counterfactual.logits(
            entries, [self._texts[row] for row in inside], number[rows][chosen], at[chosen]
        )
        logits = output.logits.clone()
        logits[tuple(index[chosen] for index in where)] = found.to(logits)
        output.logits = logits
        return output

    def _places(self, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return the indices of all logits, and the row and the position in this pass of each."""
        reader = self.language_model.reader
        assert reader.reading is not None
        if reader.places is not None:
            rows, positions = reader.places
            first = torch.arange(len(rows), device=logits.device)
            return (first, torch.zeros_like(first)), rows, positions
        rows, index = torch.ones(logits.shape[:2], device=logits.device).nonzero(as_tuple=True)
        positions = index + reader.reading.real.shape[1] - logits.shape[1]  # generation asks for the last ones only
        real = reader.reading.real[rows, positions]
        return (rows[real], index[real]), rows[real], positions[real]


def packed(entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    """Return edits as tensors: all token ids, and how many are of each prompt and each target."""
    tokens = [token for entry in entries for ids in entry for token in ids]
    lengths = [[len(ids) for ids in entry] for entry in entries]
    return {
        "tokens": torch.tensor(tokens, dtype=torch.long, device=device),
        "lengths": torch.tensor(lengths, dtype=torch.long, device=device).view(-1, len(Entry._fields)),
    }


def unpacked(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return the edits of :func:`packed`."""
    tokens, lengths = tensors["tokens"].tolist(), tensors["lengths"].flatten().tolist()
    pieces = [tuple(tokens[end - length : end]) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return [Entry(*pair) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
