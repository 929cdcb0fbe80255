"""The summary of a run: what it was, and what every part of it has to report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Summarised(Protocol):
    """A part of a run (a callback, the stream, the method) that reports something at its end."""

    def summary(self) -> Mapping[str, Any]:
        """Return entries of the summary by name, JSON-able."""
        ...


class RunSummary:
    """Collects what the parts of a run report; it knows none of them.

    Args:
        about: What the run was: method, restraint, model, data, and so on.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.entries: dict[str, Any] = dict(about)

    def collect(self, parts: Iterable[Any]) -> RunSummary:
        """Add what each part reports, if it does.

        Raises:
            ValueError: Two parts report under one name.
        """
        for part in parts:
            if isinstance(part, Summarised):
                self.add(part.summary(), type(part).__name__)
        return self

    def add(self, entries: Mapping[str, Any], who: str = "the run") -> None:
        """Add entries.

        Raises:
            ValueError: One is there already.
        """
        if twice := sorted(self.entries.keys() & entries.keys()):
            raise ValueError(f"{who} reports {', '.join(twice)} in the summary, which is there already")
        self.entries |= entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or ``default`` if nobody has reported it."""
        return self.entries.get(name, default)
