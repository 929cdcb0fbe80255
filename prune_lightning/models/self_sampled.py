"""Text that a model samples itself: a corpus for its statistics where there is no other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prune_lightning.atomic_files import write_json
from prune_lightning.distributed import on_rank_zero, rank
from prune_lightning.fingerprint import sampled_fingerprint
from prune_lightning.models.generating import generation_settings
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.phases import PhaseClock

OPENINGS = (
    *("The history of", "In the early", "The city of", "She was born in", "He is known for", "The company"),
    *("Scientists have", "The river", "In mathematics, a", "The film was", "The most important", "According to the"),
    *("The team won", "The novel tells", "For many years", "The language is", "A common way to", "The government of"),
    *("My favourite", "Once upon a time", "During the war", "The population of", "I have never", "To make the"),
)


@dataclass(frozen=True)
class SampledText:
    """How a model samples its own text.

    Args:
        tokens_per_key: Number of sampled tokens, in multiples of the width of the keys.
        length: New tokens per text.
        openings: Beginnings of the texts, used in turn; empty to begin with the model's start token.
        temperature: Divides the logits; 1 samples from the model's own distribution.
        rows: Texts that are sampled together.
        seed: Seed of the sampling.
    """

    tokens_per_key: float = 20.0
    length: int = 128
    openings: Sequence[str] = OPENINGS
    temperature: float = 1.0
    rows: int = 64
    seed: int = 0

    def limited(self, tokens_per_key: float) -> SampledText:
        """Return settings that sample this multiple of the width of the keys at most."""
        return replace(self, tokens_per_key=min(self.tokens_per_key, tokens_per_key))

    def num_texts(self, key_size: int) -> int:
        """Return the number of texts for keys of a width."""
        return math.ceil(self.tokens_per_key * key_size / self.length)


class SelfSampledCorpus:
    """The text that a model samples. It is sampled when it is first read, and kept in the cache.

    The text depends on the model, the settings, and the kind of device.

    Args:
        model: The unedited model.
        options: How to sample.
        key_size: Width of the keys whose statistics are computed.
        cache: Folder in which the texts are kept; ``None`` keeps them in memory.
        clock: Counts the texts as the phase ``sample text``; a new clock by default.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: SampledText,
        key_size: int,
        cache: Path | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self.model, self.options, self.cache, self.clock = model, options, cache, clock or PhaseClock()
        self.count = options.num_texts(key_size)
        self._texts: list[str] | None = None

    def __len__(self) -> int:
        return self.count

    def identity(self) -> str:
        """Return the settings; the model is named by the statistics that are computed over the text."""
        settings: dict[str, Any] = asdict(self.options) | {"openings": list(self.options.openings)}
        del settings["tokens_per_key"]  # only the number of texts matters
        return f"sampled {json.dumps(settings | {'texts': self.count}, sort_keys=True)}"

    def texts(self) -> Iterator[str]:
        """Yield the texts."""
        if self._texts is None:
            self._texts = self._read() or self._sample()
        yield from self._texts

    def _file(self) -> Path | None:
        if self.cache is None:
            return None
        weights = sampled_fingerprint(dict(self.model.model.named_parameters()))
        name = hashlib.blake2b(f"{weights} {self.identity()}".encode(), digest_size=8).hexdigest()
        return self.cache / "sampled_text" / f"{name}.json"

    def _read(self) -> list[str] | None:
        """Return the texts of the cache, those of rank 0."""
        file = self._file()

        def read() -> list[str] | None:
            found: list[str] | None = json.loads(file.read_text("utf-8")) if file and file.is_file() else None
            return found

        return on_rank_zero(read)

    def _sample(self) -> list[str]:
        """Sample the texts on rank 0, since rounding could make the others differ, and keep them."""
        file = self._file()

        def sample() -> list[str]:
            texts = list(sample_texts(self.model, self.options, self.count, self.clock))
            if file and not rank():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, texts)
            return texts

        return on_rank_zero(sample, everywhere=self.model.is_sharded)


@torch.no_grad()
def sample_texts(model: LanguageModel, options: SampledText, count: int, clock: PhaseClock) -> Iterator[str]:
    """Yield texts that a model samples, each as long as the others in tokens.

    Args:
        model: The model.
        options: How to sample. Batch ``i`` is seeded by ``(seed, i)`` alone, and the global generators are untouched.
        count: Number of texts.
        clock: Counts them as the phase ``sample text``.
    """
    tokenizer = model.tokens.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.tokens.pad_id
    openings = [model.tokens.encode(text) for text in options.openings] or [[start]]
    length = min(options.length, model.tokens.max_length - max(map(len, openings)))
    settings = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    devices = [model.device] if model.device.type != "cpu" else []
    with clock.phase("sample text") as phase, generation_settings(model, **settings):
        phase.expect(count)
        for batch, first in enumerate(range(0, count, options.rows)):
            rows = [openings[i % len(openings)][::-1] for i in range(first, min(first + options.rows, count))]
            ids, mask = model.tokens.pad(rows, model.device)  # padded on the left once flipped
            with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
                torch.manual_seed((options.seed << 20) + batch)
                sampled = model.model.generate(
                    input_ids=ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=length, min_new_tokens=length
                )
            for opening, row in zip(rows, sampled[:, ids.shape[1] :].tolist(), strict=True):
                yield model.tokens.decode([*opening[::-1], *row])
            phase.advance(len(rows))
