"""Context prefixes: short texts sampled from the model, put before a prompt so that an edit holds in any context."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count

_FURTHER = 64  # tokens beyond the length of a text that has no word yet


@dataclass(frozen=True)
class ContextOptions:
    """Which prefixes to sample.

    Args:
        lengths: Pairs ``(tokens, texts)``: the total length in tokens, and the number of texts of that length.
        starts: First words of the texts, used in turn; empty to begin with the start token, or the end token if there
            is none.
        top_k: Number of tokens to sample from.
        seed: Seed of the sampling.
        fixed: Use these prefixes and sample nothing.
    """

    lengths: Sequence[tuple[Count, Count]] = ((5, 10), (10, 10))
    starts: Sequence[str] = ("The", "Therefore", "Because", "I", "You")
    top_k: Count = 5
    seed: int = 0
    fixed: Sequence[str] | None = None


@torch.no_grad()
def sample_prefixes(model: LanguageModel, options: ContextOptions) -> tuple[str, ...]:
    """Return the prefixes, without the empty one. Each ends in ``". "`` so that a prompt can follow.

    A text of blanks and special tokens alone is continued until it has a word.

    Args:
        model: The model to sample from.
        options: Number and lengths of the prefixes.

    Raises:
        UserError: A text still has no word after many tokens.
    """
    if options.fixed is not None:
        return tuple(options.fixed)
    tokenizer = model.tokens.tokenizer
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    starts = [model.tokens.encode(word) for word in options.starts] or [[start]]
    prefixes = []
    generator = torch.Generator(device="cpu").manual_seed(options.seed)
    for length, count in options.lengths:
        for index in range(count):
            ids = list(starts[index * len(starts) // count])
            while len(ids) < length or not _clean(model.tokens.decode(ids)):
                if len(ids) >= length + _FURTHER:
                    raise UserError(
                        f"method.contexts: no text after {len(ids)} sampled tokens, only blanks and special tokens. "
                        "Give its first words as method.contexts.starts"
                    )
                row, mask = model.tokens.pad([ids], model.device)
                places = torch.tensor([0]), torch.tensor([len(ids) - 1])
                probabilities = model.logits_at(row, mask, *(p.to(model.device) for p in places))[0].float().softmax(0)
                top = probabilities.topk(min(options.top_k, len(probabilities)))
                choice = torch.multinomial(top.values.cpu(), 1, generator=generator)
                ids.append(int(top.indices[int(choice)]))
            prefixes.append(_clean(model.tokens.decode(ids)) + ". ")
    return tuple(prefixes)


def _clean(text: str) -> str:
    return unicodedata.normalize("NFKD", text).replace("\n", " ").strip()
