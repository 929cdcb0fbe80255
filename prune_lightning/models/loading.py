"""Loading a causal language model and its tokenizer from a folder or, by a hub name, from the hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prune_lightning.errors import UserError, near
from prune_lightning.models.family import ModelFamily
from prune_lightning.models.language_model import LanguageModel

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def local_path(path: str) -> str:
    """Return a path with ``pkg://package/inside`` resolved to where the package lies; others as they are."""
    if not path.startswith("pkg://"):
        return path
    package, _, inside = path.removeprefix("pkg://").partition("/")
    return str(resources.files(package).joinpath(inside))


def load_language_model(path: str, dtype: str = "float32", revision: str | None = None) -> LanguageModel:
    """Load a model.

    Args:
        path: A local folder, a hub name such as ``openai-community/gpt2-xl``, or ``pkg://package/folder`` for a folder
            shipped in a package. A path that looks local (absolute, beginning with ``.`` or ``~``, or of more than
            two parts) is never looked up on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        revision: Hub revision.

    Raises:
        UserError: No such folder or model, an unknown dtype, or a family without a YAML.
    """
    if dtype not in _DTYPES:
        raise UserError(f"unknown model.dtype {dtype!r}: {near(dtype, _DTYPES)}")
    path = local_path(path)
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "~", "/")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = f"; {near(folder.name, siblings)}" if siblings else ""
        raise UserError(f"model.path: no folder {path!r}{hint}")
    local = folder.is_dir()
    name = str(folder) if local else path
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, local_files_only=local)
        family = ModelFamily.find(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, local_files_only=local, dtype=_DTYPES[dtype]
        )
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model.path: {path!r} could not be loaded as a causal language model: {error}") from error
    return LanguageModel(model, tokenizer, family)
