"""Training data for learned editors: edits with paraphrases, and texts that should not change."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import lightning as L
from torch.utils.data import DataLoader, Dataset, Sampler

from prune_lightning.data.hard_negatives import HardNegatives
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.models.tokenization import Tokens
from prune_lightning.ranges import Count, Whole
from prune_lightning.types import EditRequest, MetaExample


class Texts(Protocol):
    """A source of plain texts."""

    def texts(self) -> Iterator[str]:
        """Yield the texts."""
        ...


class EpochSampler(Sampler[int]):
    """Yields the indices of one epoch's examples. They continue from epoch to epoch, also in resumed training.

    Args:
        count: Examples per epoch.
    """

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by Lightning."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.count, (self.epoch + 1) * self.count))

    def __len__(self) -> int:
        return self.count


class MetaExamples(Dataset[MetaExample]):
    """Examples drawn from requests; example ``i`` depends only on the seed and ``i``.

    Args:
        requests: The edits, each with paraphrases and locality probes.
        texts: Plain texts that should not change.
        edits: Edits per example.
        probes: Locality probes per example, drawn from those of its edits.
        num_texts: Plain texts per example.
        seed: Seed of the draws.
        in_order: Whether to use the requests in order instead of at random.
        hard: Draws prompts that take the place of a probe among :attr:`.MetaExample.unrelated`; ``None`` for none.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        texts: Sequence[str],
        edits: int,
        probes: int,
        num_texts: int,
        seed: int,
        in_order: bool = False,
        hard: HardNegatives | None = None,
    ) -> None:
        self.requests, self.texts, self.edits, self.in_order, self.hard = requests, texts, edits, in_order, hard
        self.probes, self.num_texts, self.seed = probes, num_texts, seed

    def __len__(self) -> int:
        return len(self.requests) // self.edits

    def __getitem__(self, index: int) -> MetaExample:
        """Return one example."""
        rng = random.Random(f"{self.seed}/{index}")
        if self.in_order:
            chosen = self.requests[index * self.edits : (index + 1) * self.edits]
        else:
            chosen = rng.sample(self.requests, self.edits)
        probes = rng.sample([probe for request in chosen for probe in request.locality], self.probes)
        rephrased = tuple(rng.choice(request.paraphrase_pairs()) for request in chosen)
        texts, asked = rng.sample(self.texts, self.num_texts), [probe.pair().context for probe in probes]
        if self.hard is not None and asked:
            asked[0] = self.hard.draw(chosen[0], rng) or asked[0]
        return MetaExample(
            edits=tuple(request.pair() for request in chosen),
            rephrased=rephrased,
            locality=(*(probe.pair().text for probe in probes), *texts),
            unrelated=(*asked, *texts),
        )


class EditorTrainingData(L.LightningDataModule):
    """Examples from one stream of requests for training, and from another one for validation.

    Args:
        train: Requests for training.
        validation: Requests for validation, about other subjects.
        steps: Batches per epoch.
        batch_size: Examples per batch, each with its own update.
        edits_per_update: Edits per example; should equal the batch size of later edits.
        probes: Locality probes per example.
        corpus: Source of plain texts, or ``None``.
        texts: Plain texts per example.
        text_words: Plain texts are cut to this many words.
        seed: Seed of the draws.
        hard_negatives: Draws prompts of other train edits in place of some probes; see :class:`MetaExamples`.
    """

    def __init__(
        self,
        train: EditStream,
        validation: EditStream,
        steps: Count,
        batch_size: Count = 1,
        edits_per_update: Count = 1,
        probes: Count = 1,
        corpus: Texts | None = None,
        texts: Whole = 0,
        text_words: Count = 50,
        seed: int = 0,
        hard_negatives: HardNegatives | None = None,
    ) -> None:
        super().__init__()
        if texts and corpus is None:
            raise UserError("`texts` > 0 needs a `corpus` of plain texts")
        self.streams = {"train": train, "validation": validation}
        self.steps, self.batch_size, self.edits_per_update = steps, batch_size, edits_per_update
        self.corpus, self.probes, self.num_texts, self.text_words, self.seed = corpus, probes, texts, text_words, seed
        self.hard_negatives = hard_negatives
        self._texts: list[str] | None = None

    def fit(self, tokens: Tokens) -> None:
        """Check the requests of both streams against a model; see :meth:`EditStream.fit`."""
        for stream in self.streams.values():
            stream.fit(tokens)

    def setup(self, stage: str | None = None) -> None:
        """Read the streams and the corpus.

        Raises:
            UserError: A request has no paraphrase or too few probes, or a subject is in both streams.
        """
        if self._texts is not None:
            return
        for name, stream in self.streams.items():
            stream.setup()
            for request in stream.requests:
                if not request.paraphrases or len(request.locality) < self.probes:
                    raise UserError(
                        f"case {request.case_id} of the {name} edits has {len(request.paraphrases)} paraphrases and "
                        f"{len(request.locality)} locality probes; one and {self.probes} are needed"
                    )
            if len(stream.requests) < self.edits_per_update:
                raise UserError(f"fewer {name} edits than edits_per_update={self.edits_per_update}")
        sides = [{request.subject.lower() for request in stream.requests} for stream in self.streams.values()]
        if shared := sides[0] & sides[1]:
            raise UserError(f"{len(shared)} subjects are in both the train and the validation edits: {min(shared)!r}")
        texts = self.corpus.texts() if self.corpus and self.num_texts else ()
        if self.hard_negatives is not None:
            self.hard_negatives.gather(self.streams["train"].requests)
        self._texts = [" ".join(text.split()[: self.text_words]) for text in texts]

    def _examples(self, name: str) -> MetaExamples:
        assert self._texts is not None
        return MetaExamples(
            self.streams[name].requests,
            self._texts,
            self.edits_per_update,
            self.probes,
            self.num_texts,
            self.seed,
            in_order=name == "validation",
            hard=self.hard_negatives if name == "train" else None,
        )

    def train_dataloader(self) -> DataLoader[MetaExample]:
        """Return batches as lists of examples, different in every epoch."""
        sampler = EpochSampler(self.steps * self.batch_size)
        return DataLoader(self._examples("train"), self.batch_size, sampler=sampler, collate_fn=list)

    def val_dataloader(self) -> DataLoader[MetaExample]:
        """Return the same batches in every epoch."""
        return DataLoader(self._examples("validation"), self.batch_size, collate_fn=list)
