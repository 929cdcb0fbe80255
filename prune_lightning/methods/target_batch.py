"""Requests as one padded batch, with the positions at which a fine-tuning loss is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.methods.prompts import EditRow, target_row
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest

LOSSES = ("target", "prompt_last")


class TargetBatch:
    r"""Prompts and targets of ``b`` requests, and the loss of each,

    .. math:: \mathcal L_i = -\frac1{T_i} \sum_{j=1}^{T_i} \log p(t_{ij} \mid c_{ij})

    With ``target`` the context :math:`c_{ij}` is the prompt and the target's tokens before the j-th: the ordinary
    cross-entropy of the target. With ``prompt_last`` it is the prompt alone, for every j: all of the target's tokens
    are trained into the distribution at the prompt's last token.

    Args:
        model: The language model.
        requests: The requests.
        loss: ``target`` or ``prompt_last``.
        end_of_text: The end-of-text token is the last one of each target.
        prefixes: Texts before each prompt; :math:`b` is the number of requests times that of the prefixes.

    Raises:
        UserError: ``end_of_text`` with a tokenizer that has no such token.

    Attributes:
        ids: Right-padded ids, shape ``(b, length)``, without tokens that no loss depends on.
        mask: One where ``ids`` is not padding.
        rows: Row of each position whose logits are read, shape ``(n,)``.
        positions: The position in that row, shape ``(n,)``.
    """

    def __init__(
        self,
        model: LanguageModel,
        requests: Sequence[EditRequest],
        loss: str,
        end_of_text: bool = False,
        prefixes: Sequence[str] = ("",),
    ) -> None:
        encoded = [target_row(model, request, prefix) for request in requests for prefix in prefixes]
        if end_of_text:
            end = model.tokens.tokenizer.eos_token_id
            if end is None:
                raise UserError("the tokenizer has no end-of-text token: set method.end_of_text=false")
            encoded = [EditRow([*r.ids, r.target[-1]], r.subject, [*r.target, int(end)]) for r in encoded]
        if loss == "prompt_last":
            kept = [row.ids[: row.label_positions[0] + 1] for row in encoded]
            places = [[row.label_positions[0]] for row in encoded]
        else:
            kept, places = [row.ids for row in encoded], [row.label_positions for row in encoded]
        self.ids, self.mask = model.tokens.pad(kept, model.device)

        def long(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=model.device)

        self.rows = long([i for i, of_row in enumerate(places) for _ in of_row])
        self.positions = long([position for of_row in places for position in of_row])
        self._owner = long([i for i, row in enumerate(encoded) for _ in row.target])
        self._label = long([token for row in encoded for token in row.target])
        self._place = self._owner if loss == "prompt_last" else torch.arange(len(self._owner), device=model.device)
        self._length = long([len(row.target) for row in encoded])[self._owner]
        self._count = len(encoded)

    def losses(self, logits: Tensor) -> Tensor:
        """Return the loss of each row, shape ``(b,)``, fp32 at least.

        Args:
            logits: At these positions, shape ``(n, vocabulary)``.
        """
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        labelled = -log_p[self._place, self._label]
        return labelled.new_zeros(self._count).index_add(0, self._owner, labelled / self._length)
