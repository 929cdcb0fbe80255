"""Codes of ELDER: which experts of every layer answer a prompt, how far two codes are apart, and those of the facts."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

PUBLISHED = 4  # experts of a layer
CODES = 6**6  # two of four experts in each of six layers
MOST = 16  # the most that were tried


def number_of_codes(layers: int, experts: int, active: int) -> int:
    r"""Return :math:`\binom{N}{k}^L`."""
    return math.comb(experts, active) ** layers


def experts_for(layers: int, active: int) -> int:
    """Return the smallest number of experts, from 4 to 16, with as many codes as the published setting.

    >>> experts_for(6, 2), experts_for(3, 2), experts_for(1, 2)
    (4, 9, 16)
    """
    numbers = range(max(PUBLISHED, active), MOST)
    return next((n for n in numbers if number_of_codes(layers, n, active) >= CODES), max(MOST, active))


def hamming(codes: Tensor, others: Tensor) -> Tensor:
    """Return the Hamming distance of each code to each other one, shape ``(n, m)``.

    Args:
        codes: Shape ``(n, layers, experts)``, boolean.
        others: Shape ``(m, layers, experts)``.
    """
    one, other = codes.flatten(1).float(), others.flatten(1).float()
    both = one @ other.T  # exact: small integers
    return (one.sum(1)[:, None] + other.sum(1) - 2 * both).long()


def chosen(code: Tensor, experts: int) -> Tensor:
    """Return codes as masks, shape ``(..., layers, experts)``, from the numbers of their experts."""
    mask = torch.zeros(*code.shape[:-1], experts, dtype=torch.bool, device=code.device)
    return mask.scatter(-1, code.long(), True)


def label(text: str) -> int:
    """Return 63 bits that identify a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def allocate(
    labels: Sequence[int], known_labels: Tensor, known: Tensor, shape: tuple[int, int, int], seed: int
) -> Tensor:
    """Return the experts that facts are meant to have, at random: those of an earlier fact with the same label, if any.

    Different labels get different experts as long as there are some. After that, none is given a third time before
    every one has been given twice, and so on.

    Args:
        labels: Of the facts, see :func:`label`.
        known_labels: Of earlier facts, shape ``(n,)``.
        known: Their experts, shape ``(n, layers, active)``.
        shape: ``(layers, experts, active)``.
        seed: Of the draws; combined with the number of earlier facts.

    Returns:
        Numbers of experts, ascending in each layer, shape ``(facts, layers, active)``.
    """
    layers, experts, active = shape
    total = number_of_codes(layers, experts, active)
    of_label = {number: _tuple(code) for number, code in zip(known_labels.tolist(), known, strict=True)}
    counts, codes = Counter(of_label.values()), []
    generator = torch.Generator().manual_seed(seed + len(known))
    for number in labels:
        if number not in of_label:
            given = len(of_label) // total  # times that each one may have been given
            while counts[code := _drawn(layers, experts, active, generator)] > given:
                pass
            of_label[number] = code
            counts[code] += 1
        codes.append(of_label[number])
    return torch.tensor(codes, dtype=torch.int16).view(len(labels), layers, active)


def _drawn(layers: int, experts: int, active: int, generator: torch.Generator) -> tuple[int, ...]:
    code = torch.rand(layers, experts, generator=generator).topk(active).indices.sort(1).values
    return _tuple(code)


def _tuple(code: Tensor) -> tuple[int, ...]:
    return tuple(code.flatten().tolist())
