"""Models in GGUF files, the format of llama.cpp, as far as ``transformers`` can read and dequantise them."""

from __future__ import annotations

import copy
import io
import struct
import sys
from collections.abc import Callable, Collection
from contextlib import redirect_stderr
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from prune_lightning.errors import UserError

SUFFIX = ".gguf"
_PACKAGES = ("gguf", "accelerate")
_FLOATS = ("ALL_F32", "F16", "BF16", "GUESSED")
_INSTEAD = "give the folder of the model in Hugging Face's format that the file was made from"


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def gguf_config(path: Path) -> PretrainedConfig:
    """Return the configuration of the model in a GGUF file, from the file's metadata.

    Reading a vocabulary of 49,000 tokens takes seconds, so the result is kept as long as the file does not change.

    Raises:
        UserError: A package is missing; the file is damaged or incomplete; it is no whole model; or it describes what
            ``transformers`` does not read.
    """
    state = path.stat()
    return copy.deepcopy(_read_config(path, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=4)
def _read_config(path: Path, changed: int, size: int) -> PretrainedConfig:
    read_metadata, _ = _reader(path)
    try:
        metadata, names = read_metadata(str(path))
        _check(path, metadata, names)
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "is not supported" in reason:  # the architecture
            raise UserError(f"model.path: transformers cannot read {path}: {reason} {_INSTEAD}") from error
        raise UserError(
            f"model.path: {path} is no GGUF file, or it is damaged or incomplete ({reason}); download it again"
        ) from error
    return config


def _reader(path: Path) -> tuple[Callable[[str], tuple[dict[str, Any], Collection[str]]], Any]:
    """Return what ``transformers`` reads GGUF files with: the function for their metadata, and ``GgufConfig``.

    Only the extra ``[gguf]`` asks for a release that has them, so they are imported here and nowhere else.

    Raises:
        UserError: A package is missing, or ``transformers`` is too old.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    try:
        from transformers import GgufConfig
        from transformers.integrations.gguf import read_gguf_metadata
    except ImportError:
        missing.append(f"a newer transformers than {transformers.__version__}")
    if missing:
        raise UserError(
            f"model.path: {path.name} is a GGUF file; reading it needs {' and '.join(missing)}: "
            "pip install 'prune-lightning[gguf]'"
        )
    return read_gguf_metadata, GgufConfig


def _check(path: Path, metadata: dict[str, Any], names: Collection[str]) -> None:
    """Raise an error if a file is not a whole model, or has what ``transformers`` would leave out."""
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        raise UserError(f"model.path: {path} holds no model but a {kind!r}; give the file of the model itself")
    if parts > 1:
        raise UserError(
            f"model.path: {path} is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge` first"
        )
    scaling = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    factors = [name for name in names if name.startswith("rope_")]
    if factors or scaling != "none":
        raise UserError(
            f"model.path: {path} scales rotary positions ({', '.join(factors[:2]) or scaling}), which transformers "
            f"does not read from GGUF, so the model would compute something else; {_INSTEAD}"
        )


def gguf_tensors(path: Path) -> tuple[str, Collection[str]]:
    """Return the architecture that a GGUF file names, and the names of its tensors; no tensor is read."""
    metadata, names = _reader(path)[0](str(path))
    return metadata["general.architecture"], names


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file, with its special tokens and chat template."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    return tokenizer


class _WithoutBars(io.StringIO):
    """Takes the progress bars that ``transformers`` prints while it dequantises; the run's own display continues."""

    def __init__(self) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # where `rich` writes


def gguf_weights(path: Path, config: PretrainedConfig, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model with dequantised weights, and what ``transformers`` says about missing weights.

    The peak of memory is the weights in ``dtype`` and one matrix in fp32.

    Raises:
        UserError: ``transformers`` cannot dequantise the tensors, or does not load all of them.
    """
    read_metadata, dequantised = _reader(path)
    from gguf import LlamaFileType

    auto: Any = AutoModelForCausalLM
    try:
        with redirect_stderr(_WithoutBars()):
            model, info = auto.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=dtype,
                quantization_config=dequantised(dequantize=True),
                output_loading_info=True,
                local_files_only=True,
            )
    except (RuntimeError, NotImplementedError) as error:
        reason = "it reads other shapes from its metadata than its tensors have" if "mismatch" in str(error) else error
        raise UserError(f"model.path: transformers cannot load {path}: {reason}; {_INSTEAD}") from error
    metadata, stored = read_metadata(str(path))
    if len(stored) > (loaded := len(list(model.parameters()))):
        raise UserError(
            f"model.path: {path} has {len(stored)} tensors, of which transformers loaded only {loaded}, so the model "
            f"would compute something else; {_INSTEAD}"
        )
    kind = LlamaFileType(metadata.get("general.file_type", LlamaFileType.GUESSED)).name.removeprefix("MOSTLY_")
    if kind not in _FLOATS:
        rank_zero_warn(f"{path.name} is quantised ({kind}); it is dequantised and edited so")
    return model, info
