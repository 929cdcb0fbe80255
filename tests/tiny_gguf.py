"""Writes small random models as GGUF files, as llama.cpp's converter would: the tests' own, independent of loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from prune_lightning.models.language_model import LanguageModel

# How llama.cpp stores a matrix otherwise than PyTorch, by architecture and the end of its GGUF name.
_ADDS_ONE = ("gemma2", "gemma3", "nemotron")
_CONV1D = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def gguf_name(architecture: str, name: str, layers: int) -> str:
    """Return llama.cpp's name of a tensor."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    found = [names.get_name(n, try_suffixes=(".weight", ".bias")) for n in (name, name.partition(".")[2])]
    return found[0] or found[1]


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of a query or key matrix in llama.cpp's order, in which the halves of a rotated pair are beside
    each other."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def stored(architecture: str, name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a weight as llama.cpp stores it."""
    if architecture == "llama" and ".attn_q." in name:
        return interleaved(weight, config.num_attention_heads)
    if architecture == "llama" and ".attn_k." in name:
        return interleaved(weight, config.num_key_value_heads)
    if architecture == "gpt2" and name.endswith(_CONV1D):
        return weight.T
    if architecture == "bloom" and ".attn_qkv." in name:
        return weight.unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    if architecture in _ADDS_ONE and name.endswith("norm.weight"):
        return weight + 1
    return weight


def write_gguf(
    model: LanguageModel,
    path: Path,
    types: Mapping[str, str] = MappingProxyType({}),
    extra: Mapping[str, Any] = MappingProxyType({}),
    further: Mapping[str, np.ndarray] = MappingProxyType({}),
    without: str | None = None,
    start_token: bool | None = None,
    name: str | None = None,
) -> Path:
    """Write a model with its byte-level tokenizer.

    Args:
        model: The model.
        path: The file.
        types: Storage type by the end of a tensor's GGUF name; F32 for others.
        extra: Further metadata, by key.
        further: Further tensors, by GGUF name, or other values of the model's.
        without: GGUF name of a tensor that is left out.
        start_token: Whether texts begin with the start token; `None` for what the tokenizer does.
        name: Name of the architecture, if not the model's own.
    """
    config, tokenizer = model.config, model.tokens.tokenizer
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name or architecture)
    writer.add_name("tiny")
    for key, attribute in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(config, attribute or "", None)
        if key == "rope.freq_base":
            value = config.rope_parameters.get("rope_theta")
        if value is not None:
            write = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            write(f"{architecture}.{key}", value)
    _add_tokenizer(writer, tokenizer, int(config.vocab_size))
    writer.add_add_bos_token(len(tokenizer("a")["input_ids"]) > 1 if start_token is None else start_token)
    for key, value in extra.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    arrays = {}
    for parameter, weight in model.model.named_parameters():
        target = gguf_name(architecture, parameter, config.num_hidden_layers)
        arrays[target] = stored(architecture, target, weight.detach(), config).float().contiguous().numpy()
    arrays |= further
    arrays.pop(without, None)
    for target, data in arrays.items():
        kind = next((kind for end, kind in types.items() if target.endswith(end)), "F32")
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(target, gguf.quantize(data, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(size)]
    kinds = [3 if index in special else 1 if index in vocabulary else 5 for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
