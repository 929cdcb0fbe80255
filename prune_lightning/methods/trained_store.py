"""Trained networks of an editor on disk: tensors as safetensors, and a JSON file that names the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prune_lightning.atomic_files import write_json, write_tensors
from prune_lightning.errors import UserError
from prune_lightning.models.loading import local_path

SAMPLES = 64


@dataclass(frozen=True)
class TrainedStore:
    """What the networks of one editor are called.

    Args:
        name: Of the two files, without suffix.
        option: The method's option for their folder.
        experiment: The experiment that trains them.
    """

    name: str
    option: str
    experiment: str

    @property
    def how_to_train(self) -> str:
        """What to do if there are none."""
        return f"train one with `python train.py experiment={self.experiment} model=...` and give {self.option}=FOLDER"

    def refuse(self, reason: str) -> NoReturn:
        """Raise a :class:`UserError` that names the option, and says what to do."""
        raise UserError(f"{self.option}: {reason}; {self.how_to_train}")

    def write(
        self,
        folder: Path,
        networks: nn.Module,
        description: Mapping[str, Any],
        modules: Mapping[str, nn.Module],
        dtype: torch.dtype,
    ) -> None:
        """Write networks.

        Args:
            folder: Created if missing.
            networks: A module with all networks.
            description: JSON-able.
            modules: Modules of the model that they were trained for, by the name of their weight.
            dtype: Dtype of the stored parameters; buffers keep theirs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parameters = {name for name, _ in networks.named_parameters()}
        state = _stored(networks).items()
        tensors = {name: tensor.to(dtype if name in parameters else tensor.dtype) for name, tensor in state}
        write_tensors(folder / f"{self.name}.safetensors", tensors)
        write_json(folder / f"{self.name}.json", {**description, "samples": _samples(modules)})

    def read(self, path: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """Return the folder, the description and the tensors.

        Args:
            path: A folder, or ``pkg://package/folder`` for a folder shipped in a package.

        Raises:
            UserError: The folder is missing, or a file is damaged.
        """
        folder = local_path(path)
        tensors, description = folder / f"{self.name}.safetensors", folder / f"{self.name}.json"
        for file in (tensors, description):
            if not file.is_file():
                self.refuse(f"no {file.name} in {str(folder)!r}")
        try:
            return str(folder), dict(json.loads(description.read_text("utf-8"))), load_file(tensors)
        except (SafetensorError, json.JSONDecodeError, TypeError, ValueError) as error:
            self.damaged(str(folder), error)

    def damaged(self, folder: str, error: object) -> NoReturn:
        """Raise a :class:`UserError` for files that hold something else than they should."""
        self.refuse(f"{folder!r} is damaged ({error!r})")

    def check_model(self, folder: str, trained: Mapping[str, list[float]], modules: Mapping[str, nn.Module]) -> None:
        """Raise a :class:`UserError` if the networks were trained for a model with other weights.

        Args:
            folder: The folder, for the message.
            trained: The samples of the description.
            modules: The modules of the present model, not edited yet.
        """
        for name, values in _samples(modules).items():
            there, here = torch.tensor(trained[name]), torch.tensor(values)
            # bfloat16 keeps eight bits, float16 loses what is below 6e-8
            if there.shape != here.shape or not torch.allclose(there, here, rtol=2**-7, atol=1e-6):
                self.refuse(f"{folder!r} was trained for another model ({name})")

    def fill(self, folder: str, networks: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors into networks.

        Raises:
            UserError: They do not fit.
        """
        if wrong := tensors.keys() ^ _stored(networks).keys():
            self.damaged(folder, f"{min(wrong)} is missing or of nothing")
        try:
            networks.load_state_dict(dict(tensors), strict=False)  # tied parameters have several names
        except RuntimeError as error:
            self.damaged(folder, error)


def _stored(networks: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, those with several names once."""
    once = {name for name, _ in (*networks.named_parameters(), *networks.named_buffers())}
    return {name: tensor for name, tensor in networks.state_dict().items() if name in once}


def _samples(modules: Mapping[str, nn.Module]) -> dict[str, list[float]]:
    """Return evenly spaced entries of each weight. They identify the model even after a cast to 16 bits."""
    weights = {name: module.get_parameter("weight").detach().flatten() for name, module in modules.items()}
    return {name: weight[:: -(-len(weight) // SAMPLES)].float().tolist() for name, weight in weights.items()}
