"""Gradients of an edit's loss by the output of each edited matrix, per token; no weight gradient is formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.tokenization import EncodedPair
from prune_lightning.text.separators import Pair


class LabelledRows:
    """Prompts with their targets, and plain texts, as one padded batch.

    Args:
        model: The language model.
        pairs: Prompts with their targets, tokenized or not; a plain text is ``(text, None)``.

    Attributes:
        ids: Padded ids, shape ``(rows, length)``; a target's last token is left out, since nothing follows it.
        mask: One where ``ids`` is not padding.
        row: Row of each label, shape ``(n,)``.
        position: Position whose logits predict it, shape ``(n,)``.
        label: Token ids, shape ``(n,)``.
        text_row: Row of each token of the plain texts.
        text_position: Its position.
    """

    def __init__(self, model: LanguageModel, pairs: Sequence[Pair | EncodedPair | tuple[str, None]]) -> None:
        rows, places, texts = [], [], []
        for row, given in enumerate(pairs):
            if isinstance(given, tuple) and given[1] is None:
                rows.append(model.tokens.encode(given[0])[: model.tokens.max_length])
                texts += [(row, position) for position in range(len(rows[-1]))]
            else:
                (pair,) = [given] if isinstance(given, EncodedPair) else model.tokens.encode_pairs([given])
                rows.append(pair.ids[:-1])
                places += [(row, i - 1, pair.ids[i]) for i in range(pair.target_start, len(pair.ids))]

        def columns(table: Sequence[tuple[int, ...]], count: int) -> Sequence[Tensor]:
            return torch.tensor(table, dtype=torch.long, device=model.device).view(-1, count).unbind(1)

        self.ids, self.mask = model.tokens.pad(rows, model.device)
        self.row, self.position, self.label = columns(places, 3)
        self.text_row, self.text_position = columns(texts, 2)

    def nll(self, logits: Tensor, groups: int) -> Tensor:
        """Return the mean NLL over all target tokens of each group, shape ``(groups,)``, fp32 at least.

        Args:
            logits: At the labels' positions, shape ``(n, vocabulary)``.
            groups: Rows are split into this many groups of equal size, in their order.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits, self.label, reduction="none")
        owner = self.row * groups // len(self.ids)
        zeros = losses.new_zeros(groups)
        return zeros.index_add(0, owner, losses) / zeros.index_add(0, owner, torch.ones_like(losses))


@dataclass(frozen=True)
class TokenGradients:
    r"""Inputs of one matrix and gradients of its outputs for the loss of ``g`` edits.

    Args:
        inputs: :math:`u`, the matrix's input at every token, shape ``(g, n, in_features)``.
        gradients: :math:`\delta = \partial L / \partial y`, shape ``(g, n, out_features)``.
        kept: Tokens where neither is zero, without padding, shape ``(g, n)``; only they affect the weight.
    """

    inputs: Tensor
    gradients: Tensor
    kept: Tensor


def edit_gradients(
    model: LanguageModel, modules: Mapping[str, nn.Module], rows: LabelledRows, groups: int = 1
) -> tuple[dict[str, TokenGradients], Tensor]:
    """Differentiate the mean NLL of each group's targets by the outputs of the edited modules.

    Blocks below the lowest edited module run without a graph; the backward pass stops there.

    Args:
        model: The language model.
        modules: The edited modules by the name of their weight.
        rows: The edits.
        groups: Independent edits (or batches of edits) among the rows, of equal size.

    Returns:
        Per weight its gradients, and the loss of each group.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = args[0].detach(), output if output.requires_grad else output.requires_grad_()

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        loss = rows.nll(model.logits_at(rows.ids, rows.mask, rows.row, rows.position), groups)
        found = torch.autograd.grad(loss.sum(), [output for _, output in seen.values()])
    gradients = {}
    real = rows.mask.bool().view(groups, -1)
    for (name, (inputs, _)), delta in zip(seen.items(), found, strict=True):
        inputs, delta = inputs.reshape(*real.shape, -1), delta.reshape(*real.shape, -1)
        gradients[name] = TokenGradients(inputs, delta, real & (inputs != 0).any(-1) & (delta != 0).any(-1))
    return gradients, loss.detach()
