"""The cache of keys and values in a model's forward pass, by the name that the installed ``transformers`` gives it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_NAMES = ("cache", "past_key_values")  # the new name, and that of versions before 5.24


def with_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the arguments with which a model's ``forward`` reads a cache and adds to it."""
    taken = inspect.signature(module.forward).parameters
    return {next(name for name in _NAMES if name in taken): cache, "use_cache": True}


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward pass, ``None`` if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)
