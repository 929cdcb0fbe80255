"""The summary of a run: its settings, and the results that its parts report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Summarised(Protocol):
    """A part of a run (a callback, the stream, the method) that reports results at the end of the run."""

    def summary(self) -> Mapping[str, Any]:
        """Return entries of the summary by name, JSON-able."""
        ...


class RunSummary:
    """Collects what the parts of a run report.

    Args:
        about: Settings of the run: method, restraint, model, data, and so on.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.entries: dict[str, Any] = dict(about)

    def collect(self, parts: Iterable[Any]) -> RunSummary:
        """Add the entries of every part that implements :class:`Summarised`.

        Raises:
            ValueError: Two parts report an entry of the same name.
        """
        for part in parts:
            if isinstance(part, Summarised):
                self.add(part.summary(), type(part).__name__)
        return self

    def add(self, entries: Mapping[str, Any], who: str = "the run") -> None:
        """Add entries.

        Raises:
            ValueError: The summary already has an entry of that name.
        """
        if twice := sorted(self.entries.keys() & entries.keys()):
            raise ValueError(f"{who} reports {', '.join(twice)}, which the summary already has")
        self.entries |= entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or ``default`` if no part has reported it."""
        return self.entries.get(name, default)
