"""Checks a model's folder before anything is loaded, and reports in one line what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from prune_lightning.errors import UserError, near, near_path

_LFS = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece*.model")


def no_such_folder(path: str, folder: Path) -> UserError:
    """Return the error for a path that is a file or does not exist, with similar names."""
    if folder.is_file():
        return UserError(
            f"model.path: {path!r} is a file; give a GGUF file, or the folder that holds config.json and the weights"
        )
    if folder.suffix == ".gguf":
        return UserError(f"model.path: no file {path!r}; {near_path(folder)}")
    return UserError(f"model.path: no folder {path!r}; {near_path(folder, folders=True)}")


def check_config(folder: Path) -> None:
    """Look at a model's configuration, and at all files for pointers in their place, without loading anything.

    Raises:
        UserError: Something is missing or damaged.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and _begins(path, _LFS):
            raise UserError(
                f"model.path: {path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}"
            )
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"model.path: {folder} holds a PEFT adapter, not a model; load it onto its base, merge it "
                "(`model.merge_and_unload()`), save the result and give that folder"
            )
        if files := sorted(found.name for found in folder.glob("*.gguf")):
            raise UserError(
                f"model.path: {folder} holds no config.json but {', '.join(files[:3])}; a GGUF file is given by its "
                f"own path: model.path={folder / files[0]}"
            )
        raise UserError(
            f"model.path: {folder} holds no config.json; give the folder of a model in Hugging Face's format"
        )
    config = _read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            f"model.path: {path} names no `model_type`; it is not the configuration of a transformers model"
        )
    if model_type not in CONFIG_MAPPING:
        own = "its own code is not run" if "auto_map" in config else near(model_type, list(CONFIG_MAPPING))
        raise UserError(
            f"model.path: transformers knows no model_type {model_type!r} of {path} ({own}); a newer version of "
            "transformers may know it"
        )


def check_tokenizer(folder: Path) -> None:
    """Raise an error if a model's folder holds no tokenizer; libraries would make an empty one up."""
    if not any(found for pattern in _TOKENIZERS for found in folder.glob(pattern)):
        raise UserError(
            f"model.path: {folder} holds no tokenizer; copy the files of the model's tokenizer there "
            "(tokenizer.json and tokenizer_config.json)"
        )


def _begins(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"model.path: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path: {path} is expected to hold a JSON object")
    return content


def check_weights(folder: Path) -> None:
    """Look at the files of weights in a model's folder, without loading them.

    Raises:
        UserError: They are missing, incomplete or damaged.
    """
    found = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern) if path.stem != "training_args"}
    for index in sorted(folder.glob("*.index.json")):
        shards = _read_json(index).get("weight_map", {})
        if missing := sorted(set(shards.values()) - found):
            raise UserError(
                f"model.path: {folder} lacks {len(missing)} of the {len(set(shards.values()))} files of weights that "
                f"{index.name} names: {', '.join(missing[:3])}; download them again"
            )
    if not found:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".gguf", ".h5", ".msgpack", ".pth"))
        instead = f" (but {', '.join(others[:3])}, which is not loaded)" if others else ""
        raise UserError(f"model.path: {folder} holds no weights, neither *.safetensors nor *.bin{instead}")
    for name in sorted(found):
        path = folder / name
        try:
            if path.stat().st_size == 0:
                raise SafetensorError("it is empty")
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # reads the header and compares it with the file's size
                    pass
        except SafetensorError as error:
            raise UserError(f"model.path: {path} is damaged or incomplete ({error}); download it again") from error
