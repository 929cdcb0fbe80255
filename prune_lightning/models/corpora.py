"""The texts over which a model's statistics are computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from prune_lightning.errors import UserError

SELF = "self"
"""Names the text that the model samples itself."""


class Corpus(Protocol):
    """The text over which a model's statistics are computed."""

    def texts(self) -> Iterable[str]:
        """Return the texts."""
        ...

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """Return a string that identifies the texts."""
        ...


@runtime_checkable
class CheckedCorpus(Protocol):
    """A corpus that can tell whether it can be read."""

    def check(self) -> None:
        """Raise a :class:`UserError` if it cannot."""
        ...


class CorpusUnavailable(UserError):
    """A corpus cannot be read here, since a library or the network is missing."""
