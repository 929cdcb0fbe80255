"""The base of the callbacks for Lightning's Trainer, which the Hugging Face Trainer cannot use."""

from __future__ import annotations

from typing import Any

import lightning as L

from prune_lightning.errors import UserError


class LightningCallback(L.Callback):
    """A callback of Lightning that says so to a ``transformers.Trainer``."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a ``transformers.Trainer``, which calls this first.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{type(self).__name__} is a callback for Lightning's Trainer. {self._for_hugging_face()}")

    def _for_hugging_face(self) -> str:
        return (
            "The Hugging Face Trainer takes restraints only: callbacks=[RestraintCallback(PRUNE(...))], from "
            "prune_lightning.callbacks.hugging_face"
        )
