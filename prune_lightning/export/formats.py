"""The interface of export formats, and their lookup by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from prune_lightning.errors import one_of
from prune_lightning.export.sources import ExportSource

FORMATS = ("full", "lora", "delta", "gguf", "gguf_q8_0")  # names of modules of this package
RANKED = ("lora", "delta")  # those that can approximate a change by one of a given rank


class Format(Protocol):
    """The contents of a format's module.

    A module may also have ``EPSILON``, the relative precision in which it stores edited weights if that is less than
    the model's; ``check_base(base_model)``, which raises a :class:`UserError` for a base that it cannot export; and
    ``check_weights(base_model, weights, num_layers)``, which does so for edited weights, given by name and shape.
    """

    LOW_RANK_ONLY: bool
    """Whether it cannot hold changes that are not of low rank."""

    @staticmethod
    def write(source: ExportSource, folder: Path) -> dict[str, Any]:
        """Write the files into an empty folder and return details to report."""
        ...

    @staticmethod
    def load(source: ExportSource, folder: Path) -> Any:
        """Load the files as a user would, on a copy of the base if needed, and return the model."""
        ...


def format_named(name: str) -> Format:
    """Return a format, whose module is imported on demand.

    Raises:
        UserError: There is no such format.
    """
    one_of("export format", name, FORMATS)
    return cast(Format, importlib.import_module(f"prune_lightning.export.{name}"))


def check_base(name: str, base_model: str) -> None:
    """Raise an error if a format cannot export edits of this base.

    Raises:
        UserError: There is no such format, or it cannot.
    """
    getattr(format_named(name), "check_base", lambda _: None)(base_model)


def check_weights(name: str, base_model: str, weights: Mapping[str, tuple[int, int]], num_layers: int) -> None:
    """Raise an error if a format cannot hold edits of these weights.

    Args:
        name: The format.
        base_model: Path of the model.
        weights: ``(out_features, in_features)`` of each weight to edit, by its name.
        num_layers: Number of the model's layers.

    Raises:
        UserError: There is no such format, or it cannot.
    """
    getattr(format_named(name), "check_weights", lambda *_: None)(base_model, weights, num_layers)
