"""What memory editors share: a memory at one module of one block, and training after sampled prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prune_lightning.costs import Shapes
from prune_lightning.errors import UserError
from prune_lightning.methods.side_memory import MemoryEditor
from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.models.contexts import ContextOptions, sample_prefixes
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest


class ModuleMemoryEditor(MemoryEditor):
    """Base of the editors whose memory is at one module.

    Args:
        language_model: The model to edit.
        layers: The block, one only.
        module: Name of the linear module in that block; ``None`` for the MLP's down-projection.
        kwargs: See :class:`~.base.EditingModule`.

    Attributes:
        path: Path of the module in the model.

    Raises:
        UserError: Not one layer, or no such module.
    """

    def __init__(
        self, language_model: LanguageModel, layers: Sequence[int], module: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(language_model, layers, **kwargs)
        if len(self.layers) != 1:
            raise UserError(f"{type(self).__name__} has its memory at one layer, but `layers` is {list(layers)}")
        self.path = module_path(language_model, self.layers[0], module)

    @staticmethod
    def shape(model: Shapes, layers: Sequence[int], module: str | None) -> tuple[int, int]:
        """Return the outputs and inputs of the module, for the costs."""
        (layer,) = layers
        return module_shape(model, layer, module)


def module_path(language_model: LanguageModel, layer: int, module: str | None) -> str:
    """Return the path of a block's linear module; ``None`` for the MLP's down-projection."""
    found = language_model.modules_named(layer, [module]) if module else {}
    return next(iter(found), language_model.rewrite_name(layer).removesuffix(".weight"))


def module_shape(model: Shapes, layer: int, module: str | None) -> tuple[int, int]:
    """Return the outputs and inputs of that module."""
    ((outputs, inputs),) = model.named_shapes(layer, [module]) if module else [model.edited_shape(layer)]
    return outputs, inputs


class PrefixedMemoryEditor(MemoryEditor):
    """Base of the editors that train the memory on the target after the bare prompt and after sampled prefixes.

    Args:
        language_model: The model to edit.
        layers: The blocks with the memory.
        contexts: What prefixes are sampled.
        kwargs: See :class:`~.base.EditingModule`, and the next base if there are several.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[int],
        contexts: ContextOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, **kwargs)
        self.contexts = contexts or ContextOptions()
        self.prefixes: Sequence[str] = ("",)

    @staticmethod
    def num_prefixes(contexts: ContextOptions | None) -> int:
        """Return the number of prefixes, with the empty one, for the costs."""
        return 1 + sum(number for _, number in (contexts or ContextOptions()).lengths)

    def prepare(self) -> None:
        """Sample the prefixes."""
        if len(self.prefixes) == 1:
            self.prefixes = ("", *sample_prefixes(self.language_model, self.contexts))

    def target_batch(self, *requests: EditRequest) -> TargetBatch:
        """Return the rows of requests: the prompt and target of each after every prefix."""
        return TargetBatch(self.language_model, requests, "target", prefixes=self.prefixes)
