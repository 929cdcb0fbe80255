"""The changes as one safetensors file, and a function that applies them to the same base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_lightning.devices import in_own_memory
from prune_lightning.errors import UserError
from prune_lightning.export.lowrank import lowest_rank
from prune_lightning.export.sources import ExportSource
from prune_lightning.fingerprint import fingerprint
from prune_lightning.types import LowRankUpdate

LOW_RANK_ONLY = False

FILE = "delta.safetensors"
_KEY = "prune_lightning"


def write(source: ExportSource, folder: Path) -> dict[str, Any]:
    """Write the factors of each change, or the dense change if it is smaller, in fp32 at least."""
    tensors: dict[str, Tensor] = {}
    for matrix in source.matrices:
        change = matrix.change if isinstance(matrix.change, Tensor) else lowest_rank(matrix.change)
        columns = change.left.shape[1] if isinstance(change, LowRankUpdate) else 0
        if isinstance(change, LowRankUpdate) and columns * sum(matrix.original.shape) < matrix.original.numel():
            parts = {"left": change.left, "right": change.right}
        else:
            parts = {"dense": matrix.dense_change()}
        dtype = torch.promote_types(matrix.original.dtype, torch.float32)
        tensors |= {f"{matrix.name}.{part}": tensor.to("cpu", dtype).contiguous() for part, tensor in parts.items()}
    about = {
        "base_model": source.provenance.base_model,
        "revision": source.provenance.revision,
        "weights": source.weights_metadata(),
    }
    save_file(tensors, folder / FILE, metadata={"format": "pt", _KEY: json.dumps(about)})
    return {"dense": [name.removesuffix(".dense") for name in tensors if name.endswith(".dense")]}


def load(source: ExportSource, folder: Path) -> Any:
    """Apply the file to a copy of the base."""
    model = source.base_copy()
    apply_delta(model, folder)
    return model


def apply_delta(model: nn.Module, path: str | Path) -> Mapping[str, Any]:
    r"""Write :math:`W = W_0 + \Delta` into a model, computed in fp32 at least and rounded once.

    Args:
        model: The base, a ``transformers`` model on any device; changed in place, or not at all.
        path: The file, or its folder.

    Returns:
        The file's description of its base: ``base_model``, ``revision``, and each weight's ``fingerprint``.

    Raises:
        UserError: The file is missing or damaged, or the base is another one: a weight is missing or its fingerprint
            differs.
    """
    file_path = Path(path).expanduser()
    file_path = file_path / FILE if file_path.is_dir() else file_path
    if not file_path.is_file():
        raise UserError(f"no file {str(file_path)!r}")
    try:
        with safe_open(file_path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
            tensors = in_own_memory({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{str(file_path)!r} is damaged or holds no change of weights: {error}") from error
    parameters = dict(model.named_parameters())
    for name, of_weight in about["weights"].items():
        if name not in parameters:
            raise UserError(f"the change is one of {about['base_model']}, but this model has no weight {name!r}")
        if fingerprint(parameters[name]) != of_weight["fingerprint"]:
            raise UserError(
                f"{name} is not the weight that the change applies to: use {about['base_model']} "
                f"(revision {about['revision']}) in {of_weight['dtype']}, unedited"
            )
    with torch.no_grad():
        for name, of_weight in about["weights"].items():
            delta = tensors.get(f"{name}.dense")
            if delta is None:
                delta = tensors[f"{name}.left"] @ tensors[f"{name}.right"].T
            parameter = parameters[name]
            stored = (delta.T if of_weight["transposed"] else delta).to(parameter.device)
            parameter.copy_(parameter.to(stored) + stored)
    return about
