"""What editors share whose memory is at one module of one block, and those that train it after sampled prefixes."""

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
        (layer,) = self.layers
        found = language_model.modules_named(layer, [module]) if module else {}
        self.path = next(iter(found), language_model.rewrite_name(layer).removesuffix(".weight"))

    @staticmethod
    def shape(model: Shapes, layers: Sequence[int], module: str | None) -> tuple[int, int]:
        """Return the outputs and inputs of the module, for the costs."""
        (layer,) = layers
        ((outputs, inputs),) = model.named_shapes(layer, [module]) if module else [model.edited_shape(layer)]
        return outputs, inputs


class PrefixedMemoryEditor(ModuleMemoryEditor):
    """Base of those that train the memory on the target after the bare prompt and after sampled prefixes.

    Args:
        language_model: See :class:`ModuleMemoryEditor`.
        layers: See :class:`ModuleMemoryEditor`.
        module: See :class:`ModuleMemoryEditor`.
        contexts: What prefixes are sampled.
        kwargs: See :class:`~.base.EditingModule`.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[int],
        module: str | None = None,
        contexts: ContextOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, module, **kwargs)
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

    def target_batch(self, request: EditRequest) -> TargetBatch:
        """Return the rows of a request: its prompt and target after every prefix."""
        return TargetBatch(self.language_model, [request], "target", prefixes=self.prefixes)
