"""Fingerprints of weights, which identify the matrix from which something was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from prune_lightning.sharding import whole


def sampled_fingerprint(tensors: Mapping[str, Tensor], samples: int = 65_536) -> str:
    """Return 32 hexadecimal digits that depend on names, shapes, dtypes, and evenly spaced entries of each tensor.

    For whole models, where hashing every bit would take minutes. Training and editing change most entries of a matrix.
    A sharded tensor is gathered, so that it has the fingerprint of the whole one; all processes have to call this.

    Args:
        tensors: By name.
        samples: Number of entries of each tensor that are hashed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = whole(tensor.detach()).flatten()
        # A copy: what NumPy has seen cannot be freed in place, as FSDP frees a gathered part.
        some = flat[:: -(-len(flat) // samples) or 1].clone()
        digest.update(f"{name}{tuple(tensor.shape)}{fingerprint(some)}".encode())
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
