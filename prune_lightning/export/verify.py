"""Compares a reloaded export with the live model by logits on a fixed set of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lightning.export.sources import ExportSource
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest

_EDITS = 16  # largest number of edits, evenly spaced
_OTHERS = ("The", "In the morning they", "The largest city of the country is", "She was born in", "One, two, three,")


def prompts_for(requests: Sequence[EditRequest]) -> list[str]:
    """Return the prompts of some edits, a paraphrase and a locality prompt of each, and a few unrelated ones."""
    chosen = requests[:: -(-len(requests) // _EDITS) or 1]
    prompts = [
        pair.context
        for request in chosen
        for pair in (request.pair(), *request.paraphrase_pairs()[:1], *(probe.pair() for probe in request.locality[:1]))
    ]
    return [*dict.fromkeys(prompts), *_OTHERS]


@torch.no_grad()
def next_token_logits(model: LanguageModel, prompts: Sequence[str]) -> Tensor:
    """Return the logits after each prompt, shape ``(prompts, vocabulary)``, fp64 on the CPU."""
    found = []
    with model.frozen_mode():
        for prompt in prompts:
            ids, mask = model.tokens.pad([model.tokens.encode(prompt)[-model.tokens.max_length :]], model.device)
            last = torch.tensor([int(mask.sum()) - 1], device=model.device)
            found.append(model.logits_at(ids, mask, torch.zeros_like(last), last)[0].double().cpu())
    return torch.stack(found)


@torch.no_grad()
def reloaded_logits(source: ExportSource, reloaded: Any, prompts: Sequence[str]) -> Tensor:
    """Return the logits of a model that was loaded from an export, by a plain forward pass as its user would run it.

    Args:
        source: What was exported; its tokenizer is used.
        reloaded: A ``transformers`` model, perhaps under a ``peft`` adapter.
        prompts: The prompts.
    """
    tokens, device = source.language_model.tokens, source.language_model.device
    model = reloaded.to(device).eval()
    rows = [torch.tensor([tokens.encode(prompt)[-tokens.max_length :]], device=device) for prompt in prompts]
    return torch.stack([model(input_ids=ids).logits[0, -1].double().cpu() for ids in rows])


def tolerance(logits: Tensor, dtype: torch.dtype, stored: float = 0.0) -> float:
    r"""Return the largest error that counts as rounding, :math:`\epsilon^{2/3} \max|z|` for weights of a precision.

    A change in factors, or in two parts, is rounded differently than the live weight, and the difference grows through
    the layers. The tolerance is 2.4e-5 of the largest logit in fp32 and 4 % in bf16, where the rounding of the weights
    is as large.

    Args:
        logits: Logits :math:`z` of the model.
        dtype: Its dtype.
        stored: Relative precision in which the export stores weights, if it is less.
    """
    return float(max(torch.finfo(dtype).eps, stored) ** (2 / 3) * logits.abs().max())
