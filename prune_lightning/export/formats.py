"""What every export format offers, and how one is found."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from prune_lightning.errors import one_of
from prune_lightning.export.sources import ExportSource

FORMATS = ("full", "lora", "delta")  # a module of this package each


class Format(Protocol):
    """The two functions of a format's module."""

    @staticmethod
    def write(source: ExportSource, folder: Path) -> dict[str, Any]:
        """Write the files into an empty folder; return what there is to tell about them."""
        ...

    @staticmethod
    def load(source: ExportSource, folder: Path) -> Any:
        """Load the files as a user would, on a copy of the base where one is needed; return the model."""
        ...


def format_named(name: str) -> Format:
    """Return a format; what it imports is imported only now.

    Raises:
        UserError: There is no such format.
    """
    one_of("export format", name, FORMATS)
    return cast(Format, importlib.import_module(f"prune_lightning.export.{name}"))
