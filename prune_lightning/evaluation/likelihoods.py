"""Likelihoods of tokens from logits of a large vocabulary, in little memory."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lightning.devices import rows_at_a_time


def likelihoods(logits: Tensor, index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return negative log-likelihoods and the likeliest tokens.

    The normaliser :math:`\log \sum_v e^{z_v}` is computed of a few rows at a time, since `logsumexp` holds as much
    again as its argument. A caller that keeps the logits in a variable still holds them during its next pass.

    Args:
        logits: Shape ``(rows, vocabulary)``.
        index: Row of each label, shape ``(n,)``.
        labels: Token ids, shape ``(n,)``.

    Returns:
        Two tensors of shape ``(n,)``; the first in fp32 at least.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    normaliser = torch.cat([rows.to(exact).logsumexp(-1) for rows in logits.split(rows_at_a_time(logits))])
    return normaliser[index] - logits[index, labels].to(exact), logits.argmax(-1)[index]
