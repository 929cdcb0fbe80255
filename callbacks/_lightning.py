"""The base of the callbacks for Lightning's Trainer, which the Hugging Face Trainer cannot use."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L

from prune_lightning.errors import UserError


class LightningCallback(L.Callback):
    """A callback of Lightning that says so to a ``transformers.Trainer``.

    Attributes:
        for_hugging_face: Whether ``RestraintCallback`` makes a callback for a ``transformers.Trainer`` of it.
    """

    for_hugging_face: ClassVar[bool] = False

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a ``transformers.Trainer``, which calls this first.

        Raises:
            UserError: Always.
        """
        name = type(self).__name__
        raise UserError(
            f"{name} is a callback for Lightning's Trainer. The Hugging Face Trainer takes restraints, in an adapter: "
            f"callbacks=[RestraintCallback({name if self.for_hugging_face else 'PRUNE'}(...))], from "
            "prune_lightning.callbacks.hugging_face"
        )
