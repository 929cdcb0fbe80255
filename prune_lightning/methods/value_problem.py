"""Logits as a function of one shift per request, for the value optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from prune_lightning.devices import on_device
from prune_lightning.methods.prompts import EditRow
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.hooks import capture, edit_output
from prune_lightning.models.language_model import LanguageModel


@dataclass(frozen=True)
class ShiftSite:
    """Where the shift enters.

    Args:
        layer: Index of the block.
        at: ``mlp`` for the output of the block's down-projection (ROME), ``block`` for that of the block (MEMIT).
    """

    layer: int
    at: str

    def module(self, model: LanguageModel) -> nn.Module:
        """Return the module whose output is shifted."""
        return model.rewrite_module(self.layer) if self.at == "mlp" else model.block(self.layer)


@dataclass(frozen=True)
class RequestRows:
    """The token rows of one request.

    Args:
        targets: Prompt and target under every prefix, the clean prompt first.
        divergence: The row on which the edit should not change the prediction at the subject.
    """

    targets: tuple[EditRow, ...]
    divergence: EditRow

    @property
    def all(self) -> tuple[EditRow, ...]:
        """The targets' rows, then the divergence's."""
        return (*self.targets, self.divergence)


class Layout:
    """Rows of several requests as one padded batch, with the positions of the shift and of the loss.

    Attributes:
        ids: Padded ids, shape ``(rows, length)``; a request's rows are adjacent.
        mask: One where ``ids`` is not padding.
        owner: Request of each row.
        subject: Position of the subject's last token in each row.
        clean: Row of each request's clean prompt.
        divergence: Row of each request's divergence.
        label_row: Row of each label.
        label_position: Position whose logits predict it.
        label: Token id.
        label_owner: Request of each label.
        label_weight: 1 / (target rows of the request * tokens of its target).
        read_rows: Rows of the positions whose logits are read: the labels', then the divergences'.
        read_positions: These positions.
        read_offsets: These positions, counted from the subject's.
    """

    def __init__(self, model: LanguageModel, requests: Sequence[RequestRows]) -> None:
        flat = [row for request in requests for row in request.all]
        self.ids, self.mask = model.tokens.pad([row.ids for row in flat], model.device)
        sizes = [len(request.all) for request in requests]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        labelled = [(i, row) for i, row in enumerate(flat) if row.target]
        lists = {
            "owner": [i for i, size in enumerate(sizes) for _ in range(size)],
            "subject": [row.subject for row in flat],
            "clean": [end - size for end, size in zip(ends, sizes, strict=True)],
            "divergence": [end - 1 for end in ends],
            "label_row": [i for i, row in labelled for _ in row.target],
            "label_position": [position for _, row in labelled for position in row.label_positions],
            "label": [token for _, row in labelled for token in row.target],
            "rows_of": [size - 1 for size in sizes],
            "tokens_in": [len(row.target) for _, row in labelled for _ in row.target],
        }
        there = dict(zip(lists, on_device(list(lists.values()), model.device), strict=True))
        rows_of, tokens_in = there["rows_of"].double(), there["tokens_in"]
        self.owner, self.subject, self.clean = there["owner"], there["subject"], there["clean"]
        self.divergence, self.label = there["divergence"], there["label"]
        self.label_row, self.label_position = there["label_row"], there["label_position"]
        self.label_owner = self.owner[self.label_row]
        self.label_weight = 1 / (rows_of[self.label_owner] * tokens_in)
        self.read_rows = torch.cat([self.label_row, self.divergence])
        self.read_positions = torch.cat([self.label_position, self.subject[self.divergence]])
        self.read_offsets = self.read_positions - self.subject[self.read_rows]


class ValueProblem(Protocol):
    """Logits as a function of one shift per request.

    ``reference`` is the unshifted output at the clean prompt's subject, shape ``(b, width)``; ``base_logits`` are the
    unshifted model's logits at the positions that the layout reads.
    """

    reference: Tensor
    base_logits: Tensor

    def logits(self, layout: Layout, shift: Tensor) -> Tensor:
        """Return the logits at the positions that ``layout`` reads, for shifts ``(b, width)``."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        ...


class WholeForward:
    """The plain path: run the whole model at every step."""

    def __init__(self, model: LanguageModel, site: ShiftSite, layout: Layout) -> None:
        self.model, self.site = model, site
        with torch.no_grad(), capture(outputs=[site.module(model)], stop=False, rows=len(layout.ids)) as seen:
            self.base_logits = model.logits_at(layout.ids, layout.mask, layout.read_rows, layout.read_positions)
        self.reference = seen.outputs[0][layout.clean, layout.subject[layout.clean]]

    def logits(self, layout: Layout, shift: Tensor) -> Tensor:
        """Return the logits at the positions that ``layout`` reads."""

        def add(output: Tensor) -> Tensor:
            output = output.clone()
            output[torch.arange(len(output), device=output.device), layout.subject] += shift[layout.owner].to(output)
            return output

        with edit_output(self.site.module(self.model), add, rows=len(layout.ids)):
            return self.model.logits_at(layout.ids, layout.mask, layout.read_rows, layout.read_positions)

    def select(self, rows: Tensor) -> None:
        """Do nothing: there is no cached state."""


class UpperForward:
    """The fast path: run only the blocks above the shift, from the subject's last token on.

    A shift of an MLP's output shifts its block's output, directly or through the norm that the family's YAML names.
    """

    def __init__(self, model: LanguageModel, site: ShiftSite, layout: Layout) -> None:
        self.site = site
        self.forward = CachedForward(
            model,
            site.layer,
            layout.ids,
            layout.mask,
            layout.subject,
            layout.read_rows,
            layout.read_positions,
            compact=True,
        )
        self.base_logits = self.forward.base_logits
        at_subject = self.forward.mlp_output if site.at == "mlp" else self.forward.hidden[:, 0]
        self.reference = at_subject[layout.clean]
        self._after_mlp = model.after_mlp(site.layer) if site.at == "mlp" else nn.Identity()

    def logits(self, layout: Layout, shift: Tensor) -> Tensor:
        """Return the logits at the positions that ``layout`` reads."""
        hidden, shift = self.forward.hidden, shift[layout.owner].to(self.forward.hidden)
        if not isinstance(self._after_mlp, nn.Identity):
            unshifted = self.forward.mlp_output
            shift = self._after_mlp(unshifted + shift) - self._after_mlp(unshifted)
        hidden = torch.cat([hidden[:, :1] + shift[:, None], hidden[:, 1:]], dim=1)
        return self.forward.logits_at(hidden, layout.read_rows, layout.read_offsets)

    def select(self, rows: Tensor) -> None:
        """Drop the cached states of the other rows."""
        self.forward.select(rows)
