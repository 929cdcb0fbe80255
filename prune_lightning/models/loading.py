"""Loading a causal language model and its tokenizer from a folder or, by a hub name, from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from prune_lightning.errors import UserError, near
from prune_lightning.models.family import ModelFamily
from prune_lightning.models.language_model import LanguageModel

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def local_path(path: str) -> Path:
    """Return a path, ``~`` expanded; ``pkg://package/folder`` is a folder shipped in a package."""
    if path.startswith("pkg://"):
        package, _, inside = path.removeprefix("pkg://").partition("/")
        return Path(str(resources.files(package).joinpath(inside)))
    return Path(path).expanduser()


def dtype_named(name: str) -> torch.dtype:
    """Return a dtype of weights by its name.

    Raises:
        UserError: There is no such dtype.
    """
    if name not in _DTYPES:
        raise UserError(f"unknown model.dtype {name!r}: {near(name, _DTYPES)}")
    return _DTYPES[name]


def located(path: str) -> tuple[str, bool]:
    """Return what to hand to ``from_pretrained``, and whether it is a local folder.

    Raises:
        UserError: The path looks local, and there is no such folder.
    """
    folder = local_path(path)
    looks_local = path.startswith((".", "~", "/")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = f"; {near(folder.name, siblings)}" if siblings else ""
        raise UserError(f"model.path: no folder {path!r}{hint}")
    return (str(folder), True) if folder.is_dir() else (path, False)


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Load a model's configuration alone; see :func:`load_language_model`.

    Raises:
        UserError: No such folder or model, or it cannot be reached.
    """
    name, local = located(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, local_files_only=local)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.path: the configuration of {path!r} could not be loaded: {reason}") from error
    return config


def load_language_model(
    path: str, dtype: str = "float32", revision: str | None = None, family: Mapping[str, Any] | None = None
) -> LanguageModel:
    """Load a model.

    Args:
        path: A local folder, a hub name such as ``openai-community/gpt2-xl``, or ``pkg://package/folder`` for a folder
            shipped in a package. A path that looks local (absolute, beginning with ``.`` or ``~``, or of more than
            two parts) is never looked up on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        revision: Hub revision.
        family: Contents of the family's YAML; ``None`` for the shipped one of the model's architecture.

    Raises:
        UserError: No such folder or model, an unknown dtype, or a family without a YAML.
    """
    weights_dtype = dtype_named(dtype)
    name, local = located(path)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, local_files_only=local)
        found = ModelFamily.find(config.model_type) if family is None else ModelFamily.of(family)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, local_files_only=local, dtype=weights_dtype
        )
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.path: {path!r} could not be loaded as a causal language model: {error}") from error
    return LanguageModel(model, tokenizer, found)
