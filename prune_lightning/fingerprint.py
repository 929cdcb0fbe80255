"""Fingerprints of weights: what was computed from a matrix is valid for exactly that matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def sampled_fingerprint(tensors: Mapping[str, Tensor], samples: int = 65_536) -> str:
    """Return 32 hexadecimal digits that depend on names, shapes, dtypes, and evenly spaced entries of each tensor.

    For whole models, where reading every bit would take minutes: training and editing change matrices everywhere.

    Args:
        tensors: By name.
        samples: Entries of each tensor that are looked at.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        digest.update(f"{name}{tuple(tensor.shape)}{fingerprint(flat[:: -(-len(flat) // samples) or 1])}".encode())
    return digest.hexdigest()


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
