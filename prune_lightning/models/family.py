"""Model families as data: the module paths of a ``transformers`` architecture that editing uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from typing import Any

import yaml
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from prune_lightning.errors import UserError, near

_FOLDER = ("model", "family")
# What the configurations of `transformers` call the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")


@dataclass(frozen=True)
class ModelFamily:
    """Module paths of one architecture; ``{}`` stands for the layer's index.

    Args:
        model_type: The ``model_type`` of the architecture's ``transformers`` configuration.
        block: Path of a transformer block.
        mlp: Path of a block's MLP; null if its modules are direct children of the block (OPT).
        rewrite: Path of the MLP's down-projection, the matrix that is edited.
        mlp_weights: Names of all linear modules of the MLP in ``mlp`` (in ``block`` if that is null), in the order of
            execution.
        after_mlp: Path of the norm of the MLP's output before the residual addition, if there is one.
        multiplier: Name of the configuration value that multiplies the MLP's output before the residual addition, if
            there is one (Granite).
        activation: Path of the MLP's activation function, if it is a module; few methods need it.
        tiny: Extra configuration keys for a small test model of this family, null for keys that it does not accept;
            ``parts`` are the configurations of its other submodels.
    """

    model_type: str
    block: str
    mlp: str | None
    rewrite: str
    mlp_weights: Sequence[str]
    after_mlp: str | None = None
    multiplier: str | None = None
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
                + ", ".join(f"`{f.name}`" for f in fields(cls) if f.default is MISSING and f.name != "tiny")
                + " (configs/model/family/llama.yaml is an example)"
            )
        try:
            entries = yaml.safe_load(known[model_type].read_text("utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"model/family/{model_type}.yaml is no YAML: {' '.join(str(error).split())}") from error
        return cls.from_entries(entries)

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> ModelFamily:
        """Return the family from the entries of a YAML.

        Raises:
            UserError: A key is missing or unknown.
        """
        try:
            return cls(**entries)
        except TypeError as error:
            name = entries.get("model_type", "?") if isinstance(entries, Mapping) else "?"
            reason = " ".join(str(error).split()).removeprefix("ModelFamily.__init__() ")
            raise UserError(
                f"model/family/{name}.yaml is no model family: {reason}; family/llama.yaml is an example"
            ) from error

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelFamily:
        """Return the family of a model.

        Raises:
            UserError: There is no such YAML, or the model is a mixture of experts.
        """
        if config.model_type not in family_names() and (experts := number_of_experts(config)):
            raise UserError(
                f"{config.model_type!r} is a mixture of {experts} experts: a layer has no single down-projection that "
                "could be edited; take a dense model"
            )
        return cls.find(config.model_type)


def number_of_experts(config: PretrainedConfig) -> int:
    """Return the number of experts of a layer's MLP; 0 for a dense model."""
    text = config.get_text_config()
    counts = [getattr(text, name, None) for name in _EXPERTS]
    return max((int(count) for count in counts if isinstance(count, int) and count > 1), default=0)


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

    The module's type decides; its shape would be ambiguous for square matrices.

    Raises:
        UserError: The module is neither, so that its orientation is unknown, or its weight is quantised.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module, (Conv1D, nn.Linear)):
        raise UserError(
            f"an edited module is expected to be torch.nn.Linear or transformers' Conv1D, but got {kind}; "
            "mixtures of experts, quantised layers and adapters have no single matrix to edit"
        )
    if not module.weight.is_floating_point():
        raise UserError(
            f"the weight of an edited {kind} is quantised ({module.weight.dtype}); dequantise the model first"
        )
    return isinstance(module, Conv1D)


def matrix_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return ``(out_features, in_features)`` of each module's weight, for Linear and Conv1D."""
    shapes = {}
    for name, module in modules.items():
        rows, columns = module.get_parameter("weight").shape
        shapes[name] = (columns, rows) if stores_transposed(module) else (rows, columns)
    return shapes
