"""Loads a causal language model and its tokenizer from a folder or from the hub."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx
import torch
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from prune_lightning.errors import UserError, causes, near
from prune_lightning.models.family import ModelFamily
from prune_lightning.models.gguf_file import SUFFIX, gguf_config, gguf_tokenizer, gguf_weights, is_gguf
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.model_folder import check_config, check_tokenizer, check_weights, no_such_folder
from prune_lightning.models.quantisation import prepare_dequantisation
from prune_lightning.models.tokenization import Tokens

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def local_path(path: str) -> Path:
    """Return a path, ``~`` expanded; ``pkg://package/NAME`` is a folder or file shipped in a package.

    Raises:
        UserError: The package is not installed.
    """
    if not path.startswith("pkg://"):
        return Path(path).expanduser()
    package, _, inside = path.removeprefix("pkg://").partition("/")
    try:
        found = find_spec(package)  # the package is not imported: its other dependencies may be missing
    except ModuleNotFoundError:
        found = None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{path!r}: the package {package!r} is not installed; install it with pip first")
    return Path(found.submodule_search_locations[0]) / inside


def dtype_named(name: str) -> torch.dtype:
    """Return a dtype of weights by its name.

    Raises:
        UserError: There is no such dtype.
    """
    if name not in _DTYPES:
        raise UserError(f"unknown model.dtype {name!r}: {near(name, _DTYPES)}")
    return _DTYPES[name]


def located(path: str) -> tuple[str, bool]:
    """Return the path of a model's folder or GGUF file and ``True``, or the name of a model on the hub and ``False``.

    Raises:
        UserError: The path is local, but there is no such folder or file.
    """
    folder = local_path(path)
    if is_gguf(folder):
        return str(folder), True
    looks_local = path.startswith((".", "~", "/")) or path.count("/") > 1 or folder.is_file()
    if (looks_local or folder.suffix == SUFFIX) and not folder.is_dir():
        raise no_such_folder(path, folder)
    return (str(folder), True) if folder.is_dir() else (path, False)


def anchored(path: str) -> str:
    """Return a path that names the same model from any working folder: a local one is made absolute."""
    folder = local_path(path)
    return path if path.startswith("pkg://") or not folder.exists() else str(folder.absolute())


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Load only a model's configuration; see :func:`load_language_model`.

    Raises:
        UserError: No such folder or model, or it cannot be reached.
    """
    name, local = located(path)
    if is_gguf(Path(name)):
        return gguf_config(Path(name))
    if local:
        check_config(Path(name))
    with _one_line(path):
        config: PretrainedConfig = AutoConfig.from_pretrained(**_files(path, revision))
    return config


def load_tokens(path: str, revision: str | None = None) -> Tokens:
    """Load a model's tokenizer, with the length of the model's context from its configuration.

    Raises:
        UserError: No such folder or model, or it cannot be reached.
    """
    config = load_config(path, revision)
    tokenizer = _load_tokenizer(path, config, revision)
    return Tokens(tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None))


def load_language_model(
    path: str, dtype: str = "float32", revision: str | None = None, family: Mapping[str, Any] | None = None
) -> LanguageModel:
    """Load a model. Quantised weights are dequantised where ``transformers`` can do that.

    Args:
        path: A local folder or GGUF file, a hub name such as ``openai-community/gpt2-xl``, or ``pkg://package/NAME``
            for a folder or a GGUF file shipped in a package. Local paths (absolute, beginning with ``.`` or ``~``, or
            with more than two parts) are never looked up on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        revision: Hub revision.
        family: Contents of the family's YAML; ``None`` for the shipped one of the model's architecture.

    Raises:
        UserError: The folder or model does not exist or is incomplete or damaged; the dtype is unknown; the family has
            no YAML; the tokenizer is of another model; or the weights cannot be dequantised.
    """
    weights_dtype = dtype_named(dtype)
    config = load_config(path, revision)
    known = ModelFamily.of(config) if family is None else ModelFamily.from_entries(family)
    name, local = located(path)
    if local and not is_gguf(Path(name)):
        check_weights(Path(name))
    tokenizer = _load_tokenizer(path, config, revision)
    with _one_line(path):
        model = _load_weights(path, config, weights_dtype, revision)
    return LanguageModel(model, tokenizer, known)


def _files(path: str, revision: str | None) -> dict[str, Any]:
    """Return the arguments of every ``from_pretrained`` that say where the files come from."""
    name, local = located(path)
    return {
        "pretrained_model_name_or_path": name,
        "revision": revision,
        "local_files_only": local or hub_is_offline(),
    }


def _load_tokenizer(path: str, config: PretrainedConfig, revision: str | None) -> Any:
    name, local = located(path)
    in_gguf = is_gguf(Path(name))
    if local and not in_gguf:
        check_tokenizer(Path(name))
    with _one_line(path, "its tokenizer"):
        tokenizer = gguf_tokenizer(Path(name)) if in_gguf else AutoTokenizer.from_pretrained(**_files(path, revision))
        _check_tokenizer(path, tokenizer, int(config.get_text_config().vocab_size))
    return tokenizer


def _load_weights(path: str, config: PretrainedConfig, dtype: torch.dtype, revision: str | None) -> Any:
    """Load the weights in ``dtype``; none may be left as they are initialised."""
    name, _ = located(path)
    if is_gguf(Path(name)):
        model, info = gguf_weights(Path(name), config, dtype)
    else:
        dequantise = prepare_dequantisation(config)
        auto: Any = AutoModelForCausalLM
        files = _files(path, revision)
        model, info = auto.from_pretrained(config=config, dtype=dtype, output_loading_info=True, **files)
        model = dequantise(model)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path: {path!r} lacks {len(missing)} weights that its config.json asks for, {missing[0]} for one; "
            "config.json and the files of weights do not belong together"
        )
    if unused := sorted(info["unexpected_keys"]):
        rank_zero_warn(f"{path!r} holds {len(unused)} weights that the model has no place for, {unused[0]} for one")
    return model.to(dtype)


def _check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise an error if the tokenizer encodes a text to nothing, or has tokens without an embedding."""
    if not tokenizer("The capital of Japan", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"model.path: the tokenizer of {path!r} makes no tokens of a text; copy the model's tokenizer.json and "
            "tokenizer_config.json there"
        )
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > embeddings:
        raise UserError(
            f"model.path: the tokenizer of {path!r} has {tokens} tokens, but the model only {embeddings} embeddings; "
            "take the model's own tokenizer, or save the model after `model.resize_token_embeddings(len(tokenizer))`"
        )


@contextmanager
def _one_line(path: str, what: str = "the model") -> Iterator[None]:
    """Convert any error of a library about a model into one line, except out-of-memory errors."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # damaged files can raise anything, including unpickling errors
        if _unreachable(error):
            raise UserError(
                f"model.path: {path!r} is no local folder, and the hub cannot be reached; download the model where "
                "there is a network (`hf download`), and give its folder"
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise UserError(f"model.path: {path!r}: {what} could not be loaded: {kind}{reason}") from error


def hub_is_offline() -> bool:
    """Whether the hub's host name cannot be resolved. Otherwise its client would retry for a long time."""
    if getproxies():  # proxies resolve names themselves
        return False
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _unreachable(error: BaseException) -> bool:
    """Whether an error means that the hub is unreachable."""
    kinds = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError)
    return any(isinstance(cause, kinds) for cause in causes(error))
