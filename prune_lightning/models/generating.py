"""Settings of ``generate`` that replace a checkpoint's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from prune_lightning.models.language_model import LanguageModel
from prune_lightning.sharding import logits_of_first


@contextmanager
def generation_settings(model: LanguageModel, **settings: Any) -> Iterator[set[int]]:
    """Disable a checkpoint's own generation settings (sampling, penalties) inside the block; yield its end tokens.

    All processes of a sharded model generate the first one's texts.

    Args:
        model: The language model; in frozen mode inside the block.
        settings: Settings of ``GenerationConfig``; greedy decoding up to an end token by default.
    """
    own = model.model.generation_config
    wished = own.eos_token_id
    ends = wished if isinstance(wished, list) else [wished]
    ends = sorted({*ends, model.tokens.tokenizer.eos_token_id} - {None})
    defaults = {"eos_token_id": ends or None, "pad_token_id": model.tokens.pad_id, "do_sample": False, "num_beams": 1}
    model.model.generation_config = GenerationConfig(**(defaults | settings))
    try:
        with model.frozen_mode(), logits_of_first(model.model):
            yield set(ends)
    finally:
        model.model.generation_config = own
