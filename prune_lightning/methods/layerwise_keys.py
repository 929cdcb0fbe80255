"""Reads keys at the subject, layer by layer from below, while the layers are edited one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prune_lightning.methods.prompts import EditRow
from prune_lightning.models.hooks import capture, edit_input, pass_through
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.packing import pack


class LayerwiseKeyReader:
    """Reads keys from the lowest layer up.

    Each pass starts at the last layer read, whose input later edits do not change.

    Args:
        model: The language model.
        rows: Token rows that end at the subject's last token.
        until: If given, every pass runs up to this block, and :attr:`hidden` is its output.

    Attributes:
        hidden: Output of block ``until`` at the subject in the latest pass, shape ``(rows, width)``, fp64.
    """

    def __init__(self, model: LanguageModel, rows: Sequence[EditRow], until: int | None = None) -> None:
        self.model, self.until = model, until
        packed = pack(model, *model.tokens.pad([row.ids for row in rows], model.device))
        self._inputs = packed.inputs
        subject = torch.tensor([row.subject for row in rows], device=model.device)
        self._at = packed.find(torch.arange(len(rows), device=model.device), subject)
        self._begin: tuple[int, Tensor] | None = None
        self.hidden: Tensor | None = None

    @torch.no_grad()
    def keys(self, layer: int, until: int | None = None) -> Tensor:
        """Return the input of the down-projection of ``layer`` at the subject, shape ``(rows, in_features)``, fp64.

        Args:
            layer: Must be above the layer of the previous call.
            until: The block whose output :attr:`hidden` is, in place of the reader's own.
        """
        model, until = self.model, self.until if until is None else until
        outputs: list[nn.Module] = [] if until is None else [model.block(until)]
        wanted: list[nn.Module] = [model.block(layer), model.rewrite_module(layer)]
        rows = len(self._inputs["input_ids"])
        with self._beginning(), capture(wanted, outputs, rows=rows) as seen:
            model(**self._inputs)
        self._begin = layer, seen.inputs[0]
        self.hidden = seen.outputs[0][self._at].double() if outputs else None
        return seen.inputs[1][self._at].double()

    @contextmanager
    def _beginning(self) -> Iterator[None]:
        if self._begin is None:
            yield
            return
        layer, hidden = self._begin
        below = [self.model.block(index) for index in range(layer)]
        with pass_through(below, self.model.block_returns_tuple), edit_input(self.model.block(layer), lambda _: hidden):
            yield
