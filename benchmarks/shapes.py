"""Models of known shapes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model

_SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "toy": {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 256}
    | _SMALL,
    "llama-2-7b": {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096} | _7B,
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device, **changes: Any) -> LanguageModel:
    """Return a model of a shape, with optional changes, with random weights and the bundled model's tokenizer."""
    settings = SHAPES[shape] | changes
    # Without padding in the configuration: its embedding would be zero, which a norm's gradient divides by, block by
    # block, until it is infinite.
    config = AutoConfig.for_model(settings.pop("model_type"), bos_token_id=0, eos_token_id=0, **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(model, load_language_model("pkg://prune_lightning.bundled/model").tokens.tokenizer)
