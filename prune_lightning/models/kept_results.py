"""Results that are computed once as long as a model stays as it is."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any


class KeptResults:
    """Results of a model by key; none are kept outside :meth:`while_unchanged`."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] | None = None

    @contextmanager
    def while_unchanged(self) -> Iterator[None]:
        """Say that the model stays as it is inside the block, so that the same results are computed once."""
        outer, self._found = self._found, {} if self._found is None else self._found
        try:
            yield
        finally:
            self._found = outer

    @contextmanager
    def nothing(self) -> Iterator[None]:
        """Use no kept results inside the block, and keep none."""
        outer, self._found = self._found, None
        try:
            yield
        finally:
            self._found = outer

    def get(self, key: Hashable, default: Any) -> Any:
        """Return what is kept under a key, or ``default``."""
        return default if self._found is None else self._found.get(key, default)

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value, if the model is known to stay as it is."""
        if self._found is not None:
            self._found[key] = value
