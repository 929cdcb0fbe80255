"""Fingerprints of weights: what was computed from a matrix is valid for exactly that matrix."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fingerprint(tensor: Tensor) -> str:
    """Return 32 hexadecimal digits that depend on shape, dtype and every bit.

    >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2).clone())
    True
    >>> fingerprint(torch.zeros(2)) == fingerprint(-torch.zeros(2))
    False
    """
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
