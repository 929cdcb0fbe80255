"""Model families as data: where a ``transformers`` architecture keeps the parts that editing touches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from prune_lightning.errors import UserError, near

_FOLDER = ("model", "family")


@dataclass(frozen=True)
class ModelFamily:
    """Module paths of one architecture; ``{}`` stands for the layer's index.

    Args:
        model_type: The ``model_type`` of the architecture's ``transformers`` configuration.
        block: Path of a transformer block.
        mlp: Path of a block's MLP.
        rewrite: Path of the MLP's down-projection, the matrix that is edited.
        mlp_weights: Names of all linear modules of the MLP, below ``mlp``, in the order in which they run.
        after_mlp: Path of the norm that the MLP's output passes before it joins the residual stream, if it does.
        activation: Path of the MLP's activation function, a module of its own; few methods ask for it.
        tiny: Extra configuration keys that a two-layer test model of this family needs.
    """

    model_type: str
    block: str
    mlp: str
    rewrite: str
    mlp_weights: Sequence[str]
    after_mlp: str | None = None
    activation: str | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, model_type: str) -> ModelFamily:
        """Read the family's YAML.

        Raises:
            UserError: There is no such YAML; the message says which file to write.
        """
        known = {path.name.removesuffix(".yaml"): path for path in _family_folder().iterdir()}
        if model_type not in known:
            raise UserError(
                f"no model family {model_type!r} ({near(model_type, known)}); to add it, write "
                f"configs/model/family/{model_type}.yaml, or model/family/{model_type}.yaml in a folder given by "
                "--config-dir, with the keys "
                + ", ".join(f"`{f.name}`" for f in fields(cls) if f.name not in ("tiny", "after_mlp", "activation"))
                + " (configs/model/family/llama.yaml is an example)"
            )
        return cls.of(yaml.safe_load(known[model_type].read_text("utf-8")))

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> ModelFamily:
        """Return the family that a YAML describes.

        Raises:
            UserError: A key is missing or unknown.
        """
        try:
            return cls(**entries)
        except TypeError as error:
            name = entries.get("model_type", "?")
            reason = str(error).partition("() ")[2]
            raise UserError(f"model/family/{name}.yaml: {reason}; family/llama.yaml is an example") from error


def _family_folder() -> Any:
    folder = resources.files("prune_lightning.configs")
    for part in _FOLDER:
        folder = folder.joinpath(part)
    return folder


def family_names() -> list[str]:
    """Return the model types that have a YAML."""
    return sorted(path.name.removesuffix(".yaml") for path in _family_folder().iterdir())


def stores_transposed(module: nn.Module) -> bool:
    """Whether ``module.weight`` is ``in x out`` (GPT-2's ``Conv1D``) and not ``out x in`` (``nn.Linear``).

    The module's type decides, never its shape, which would be ambiguous for square matrices.

    Raises:
        UserError: The module is neither; its orientation is unknown.
    """
    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise UserError(f"an edited module is expected to be Linear or Conv1D, but got {type(module).__name__}")
