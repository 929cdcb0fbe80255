"""The training text of the bundled model by kind, packed into windows."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from prune_lightning.bundled.abilities import abilities, plain_text
from prune_lightning.bundled.world import World, load_world
from prune_lightning.ranges import Count, NonNegative


def training_documents(world: World | None = None) -> dict[str, list[str]]:
    """Return every document of the training text, grouped by kind (``facts``, each ability, ``text``)."""
    world = world or load_world()
    documents = {"facts": [sentence for fact in world.facts for sentence in fact.statements()]}
    documents |= {name: [item.text() for item in task.train] for name, task in abilities(world).items()}
    documents["text"] = [item.text() for item in plain_text().train]
    return documents


class PackedWindows(Dataset[Tensor]):
    """Windows of fixed length, filled with documents drawn by kind; window ``i`` depends only on the seed and ``i``.

    Args:
        documents: Tokenised documents by kind.
        shares: Probability of each kind at every draw.
        length: Tokens per window.
        separator: Token between documents and at the beginning of a window.
        count: Number of windows.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[Sequence[int]]],
        shares: Mapping[str, float],
        length: int,
        separator: int,
        count: int,
        seed: int,
    ) -> None:
        self.documents = [documents[kind] for kind in shares]
        self.shares = list(shares.values())
        self.length, self.separator, self.count, self.seed = length, separator, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Return one window of token ids, shape ``(length,)``."""
        rng = random.Random(self.seed * 1_000_003 + index)
        window: list[int] = []
        while len(window) < self.length:
            (pool,) = rng.choices(self.documents, self.shares)
            window += [self.separator, *rng.choice(pool)]
        return torch.tensor(window[: self.length])


class BundledCorpus:
    """The corpus of the bundled model's statistics: documents of the training text, drawn by kind as in training.

    Args:
        samples: Number of documents.
        shares: Probability of each kind at every draw.
        seed: Seed of the draws.
    """

    def __init__(self, samples: Count, shares: Mapping[str, NonNegative], seed: int = 0) -> None:
        self.samples, self.shares, self.seed = samples, dict(shares), seed

    def __len__(self) -> int:
        return self.samples

    def identity(self) -> str:
        """Return a digest of the training text, and the settings."""
        text = json.dumps(training_documents()).encode()
        return f"{hashlib.blake2b(text, digest_size=16).hexdigest()} {self.samples} {self.shares} {self.seed}"

    def texts(self) -> Iterator[str]:
        """Yield the documents."""
        documents = training_documents()
        rng = random.Random(self.seed)
        for kind in rng.choices(list(self.shares), list(self.shares.values()), k=self.samples):
            yield rng.choice(documents[kind])
