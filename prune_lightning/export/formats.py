"""The interface of export formats, and their lookup by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from prune_lightning.errors import one_of
from prune_lightning.export.sources import ExportSource

FORMATS = ("full", "lora", "delta")  # names of modules of this package


class Format(Protocol):
    """The contents of a format's module."""

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
