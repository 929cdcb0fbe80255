"""A trained MEND network on disk: tensors as safetensors, and a JSON file that describes the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prune_lightning.atomic_files import write_json, write_tensors
from prune_lightning.errors import UserError
from prune_lightning.methods.mend_network import MENDNetwork, NetworkShape
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.loading import local_path

TENSORS, DESCRIPTION = "hypernetwork.safetensors", "hypernetwork.json"
SAMPLES = 64
HOW_TO_TRAIN = "train one with `python train.py experiment=train_mend model=...` and give method.hypernetwork=FOLDER"


def matrix_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return ``(out_features, in_features)`` of each module's weight, for Linear and Conv1D."""
    shapes = {}
    for name, module in modules.items():
        rows, columns = module.get_parameter("weight").shape
        shapes[name] = (columns, rows) if stores_transposed(module) else (rows, columns)
    return shapes


def _samples(modules: Mapping[str, nn.Module]) -> dict[str, list[float]]:
    """Return evenly spaced entries of each weight. They identify the model even after a cast to 16 bits."""
    weights = {name: module.get_parameter("weight").detach().flatten() for name, module in modules.items()}
    return {name: weight[:: -(-len(weight) // SAMPLES)].float().tolist() for name, weight in weights.items()}


def save_network(
    folder: Path,
    network: MENDNetwork,
    modules: Mapping[str, nn.Module],
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a network.

    Args:
        folder: Created if missing.
        network: The network.
        modules: The modules that it was trained for, with the weights of the training.
        facts: How it was trained; JSON-able.
        dtype: Dtype of the stored parameters; the running moments are stored in double precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name for name, _ in network.named_parameters()}
    tensors = {
        name: tensor.to(dtype if name in parameters else tensor.dtype) for name, tensor in network.state_dict().items()
    }
    write_tensors(folder / TENSORS, tensors)
    description = {"shape": asdict(network.shape), "matrices": network.matrices, "samples": _samples(modules)}
    write_json(folder / DESCRIPTION, {**description, "training": dict(facts)})


def load_network(path: str, modules: Mapping[str, nn.Module]) -> MENDNetwork:
    """Read the network of a model.

    Args:
        path: A folder, or ``pkg://package/folder`` for a folder shipped in a package.
        modules: The modules to edit, not edited yet, by the name of their weight.

    Raises:
        UserError: The folder is missing, a file is damaged, or the network is of other matrices or another model.
    """
    folder = local_path(path)
    for name in (TENSORS, DESCRIPTION):
        if not (folder / name).is_file():
            raise UserError(f"method.hypernetwork: no {name} in {str(folder)!r}; {HOW_TO_TRAIN}")
    try:
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        trained = {name: tuple(shape) for name, shape in description["matrices"].items()}
        shape, samples = NetworkShape(**description["shape"]), {name: description["samples"][name] for name in trained}
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"method.hypernetwork: {str(folder)!r} is damaged ({error!r}); {HOW_TO_TRAIN}") from error
    wanted = matrix_shapes(modules)
    if trained != wanted:
        raise UserError(
            f"method.hypernetwork: {str(folder)!r} was trained for the matrices {_listed(trained)}, but method.layers "
            f"and method.weights ask for {_listed(wanted)}; {HOW_TO_TRAIN}"
        )
    _check_model(str(folder), samples, _samples(modules))
    return _filled(str(folder), MENDNetwork(wanted, shape), tensors)


def _listed(matrices: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{name} ({rows}x{columns})" for name, (rows, columns) in matrices.items())


def _check_model(folder: str, trained: Mapping[str, list[float]], present: Mapping[str, list[float]]) -> None:
    for name, values in present.items():
        there, here = torch.tensor(trained[name]), torch.tensor(values)
        # bfloat16 keeps eight bits, float16 loses what is below 6e-8
        if there.shape != here.shape or not torch.allclose(there, here, rtol=2**-7, atol=1e-6):
            raise UserError(f"method.hypernetwork: {folder!r} was trained for another model ({name}); {HOW_TO_TRAIN}")


def _filled(folder: str, network: MENDNetwork, tensors: Mapping[str, Tensor]) -> MENDNetwork:
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"method.hypernetwork: {folder!r} is damaged ({error}); {HOW_TO_TRAIN}") from error
    return network
