"""Adapters that a user's model carries."""

from __future__ import annotations

from torch import nn

from prune_lightning.errors import UserError


def refuse_adapters(model: nn.Module) -> None:
    """Raise an error if a model carries adapters of ``peft``.

    They are the user's: an edit neither changes nor removes them, and a matrix below one is not what the model computes
    with.

    Raises:
        UserError: It does; the message says how to merge them.
    """
    for path, module in model.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            where = f"at {path!r}" if path else "around the whole model"
            raise UserError(
                f"the model carries a PEFT adapter ({type(module).__name__} {where}); merge it first "
                "(`model = peft_model.merge_and_unload()`) and edit the merged model"
            )
