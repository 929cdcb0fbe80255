"""A trained MEND network on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_lightning.methods.mend_network import MENDNetwork, NetworkShape
from prune_lightning.methods.trained_store import TrainedStore
from prune_lightning.models.family import matrix_shapes

STORE = TrainedStore("hypernetwork", "method.hypernetwork", "train_mend")


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
    description = {"shape": asdict(network.shape), "matrices": network.matrices, "training": dict(facts)}
    STORE.write(folder, network, description, modules, dtype)


def load_network(path: str, modules: Mapping[str, nn.Module]) -> MENDNetwork:
    """Read the network of a model.

    Args:
        path: A folder, or ``pkg://package/folder`` for a folder shipped in a package.
        modules: The modules to edit, not edited yet, by the name of their weight.

    Raises:
        UserError: The folder is missing, a file is damaged, or the network is of other matrices or another model.
    """
    folder, description, tensors = STORE.read(path)
    try:
        trained = {name: tuple(shape) for name, shape in description["matrices"].items()}
        shape, samples = NetworkShape(**description["shape"]), {name: description["samples"][name] for name in trained}
    except (KeyError, TypeError, AttributeError) as error:
        STORE.damaged(folder, error)
    wanted = matrix_shapes(modules)
    if trained != wanted:
        STORE.refuse(
            f"{folder!r} was trained for the matrices {_listed(trained)}, but method.layers and method.weights ask for "
            f"{_listed(wanted)}"
        )
    STORE.check_model(folder, samples, modules)
    network = MENDNetwork(wanted, shape)
    STORE.fill(folder, network, tensors)
    return network


def _listed(matrices: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{name} ({rows}x{columns})" for name, (rows, columns) in matrices.items())
