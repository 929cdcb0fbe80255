"""The model of an editor: loaded here, or given by the caller, who gets it back as it was."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_lightning.editor.surroundings import quiet
from prune_lightning.errors import UserError, kind_of
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.tasks.choices import preset_for
from prune_lightning.tasks.recipe import Recipe, composed

_MARK = "_held_by_prune_lightning"


class HeldModel:
    """A model on its device, with what is needed to give a caller's model back.

    Args:
        recipe: Names the model to load.
        model: The caller's model; ``None`` to load one.
        tokenizer: The tokenizer of the caller's model.
        device: Device of a model that is loaded; the accelerator by default, if there is one.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._flags: list[bool] = []
        if model is None:
            with quiet():
                self.language_model = recipe.language_model().to(device_of(device))
        elif tokenizer is None:
            raise UserError("a loaded model needs its tokenizer: Editor(model, tokenizer=tokenizer)")
        else:
            self._hold(model)
            try:
                self.language_model = LanguageModel(model, tokenizer)
            except BaseException:
                self.give_back()
                raise

    def _hold(self, model: PreTrainedModel) -> None:
        """Mark a caller's model as held, and note what it is set to.

        Raises:
            UserError: Another editor holds it; this one would take the edited weights for the original ones.
        """
        if _is_held(model):
            gc.collect()  # an editor that nobody refers to may be left
        if _is_held(model):
            raise UserError("another editor holds this model: edit it with that one, or close() that one first")
        model.__dict__[_MARK] = id(model)
        self._release = finalize(self, model.__dict__.pop, _MARK, None)
        self._model, self._training = model, model.training
        self._flags = [parameter.requires_grad for parameter in model.parameters()]

    def give_back(self) -> None:
        """Restore what a caller's model was set to, apart from its weights."""
        if self._flags:
            self._release()
            self._model.train(self._training)
            for parameter, flag in zip(self._model.parameters(), self._flags, strict=True):
                parameter.requires_grad_(flag)


def _is_held(model: PreTrainedModel) -> bool:
    """Whether an editor holds a model. A copy has the mark of the model that it was made of, and is not held."""
    return model.__dict__.get(_MARK) == id(model)


def device_of(wanted: str | torch.device | None) -> torch.device:
    """Return a device; the accelerator by default, if there is one."""
    if wanted is not None:
        try:
            return torch.empty(0, device=torch.device(wanted)).device
        except (RuntimeError, AssertionError) as error:  # no such device, or a build of PyTorch without it
            reason = str(error).splitlines()[0]
            hint = (
                "give cpu, cuda, cuda:1, mps or another of PyTorch's"
                if reason.startswith("Expected one of")
                else reason
            )
            raise UserError(f"the device {str(wanted)!r} cannot be used: {hint}") from error
    # A build of PyTorch for CUDA names its accelerator where there is none, too.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def recipe_for(
    model: str | Path | PreTrainedModel,
    method: str,
    restraint: str,
    options: Mapping[str, Any],
    device: str | torch.device | None,
) -> Recipe:
    """Return the recipe of an editor, with the hyper-parameters that ``train.py`` would find.

    Args:
        model: See :class:`~.editor.Editor`.
        method: Name of the method.
        restraint: Name of the restraint.
        options: Settings that take precedence.
        device: The device of a model that is loaded.

    Raises:
        UserError: An unknown name or option.
    """
    if not isinstance(model, (str, Path, nn.Module)):
        raise UserError(f"the model is expected to be a name, a path or a transformers model, but got {kind_of(model)}")
    config = None if isinstance(model, (str, Path)) else model.config
    path = str(model) if config is None else str(config._name_or_path or "in memory")
    preset, located = preset_for(path)
    settings = {
        **options,
        "model": {**located, **options.get("model", {})},
        "trainer": {"accelerator": "cpu" if device_of(device).type == "cpu" else "auto"},
    }
    with composed({"model": preset, "method": method, "restraint": restraint}, settings, config) as found:
        return Recipe.of(found)
