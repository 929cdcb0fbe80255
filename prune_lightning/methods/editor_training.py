"""What editors share whose networks are trained before any edit, each by a ``Trainer.fit`` of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from prune_lightning.methods.trained_store import TrainedStore
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import MetaExample


class EditorTraining(L.LightningModule, ABC):
    """Trains the networks of an editor. The language model is not trained, and a checkpoint does not hold it.

    Args:
        language_model: The model.
        networks: What is trained.

    Attributes:
        network: What is trained.
    """

    def __init__(self, language_model: LanguageModel, networks: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model
        self.network = networks.requires_grad_(True).train()
        self.strict_loading = False  # a checkpoint holds the networks, not the language model

    @abstractmethod
    def measured(self, batch: list[MetaExample]) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch, and the parts that are logged with it."""

    @abstractmethod
    def scores(self, batch: list[MetaExample]) -> dict[str, Tensor]:
        """Return the loss and its parts as :meth:`measured` does, and the scores of the validation."""

    def transfer_batch_to_device(
        self, batch: list[MetaExample], device: torch.device, dataloader_idx: int
    ) -> list[MetaExample]:
        """Examples are text: nothing to move."""
        return batch

    def training_step(self, batch: list[MetaExample], batch_idx: int) -> Tensor | None:
        """Return the loss of a batch, or ``None`` to skip one that is not finite."""
        with self.language_model.frozen_mode():
            found = self.measured(batch)
        self._log("train", found, len(batch))
        loss = found["loss"]
        return loss if torch.isfinite(loss) else None

    def validation_step(self, batch: list[MetaExample], batch_idx: int) -> None:
        """Log the losses and the scores. Running moments do not change."""
        with self.language_model.frozen_mode():
            found = self.scores(batch)
        self._log("val", found, len(batch))

    def _log(self, part: str, found: Mapping[str, Tensor], count: int) -> None:
        self.log_dict({f"{part}/{name}": value.detach() for name, value in found.items()}, batch_size=count)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient. A non-finite gradient is dropped, so that the optimizer's step changes nothing."""
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            optimizer.zero_grad()
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the language model, which is not trained, from the checkpoint."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name.startswith("network.")}


class TrainedEditor(ABC):
    """An editing method with networks that are trained before.

    Attributes:
        store: Where its networks are kept. The option of the constructor is ``None`` for untrained ones.
    """

    store: ClassVar[TrainedStore]

    @abstractmethod
    def training_module(self) -> EditorTraining:
        """Return the training of the networks."""

    @abstractmethod
    def save_trained(self, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Write the networks.

        Args:
            folder: Created if missing.
            facts: How they were trained; JSON-able.
            dtype: Dtype of the stored parameters.
        """
