"""Display names of scores, as each measurement defines them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Labels:
    """Titles of measurements and labels of their scores.

    Args:
        groups: By the name of a measurement, its ``title`` and, by key, its ``scores``: ``labels`` in a run's summary.

    Examples:
        >>> labels = Labels({"edit/zsre": {"title": "edits, zsRE", "scores": {"harmonic": "harmonic mean"}}})
        >>> labels.title("edit/zsre/harmonic"), labels.label("edit/zsre/harmonic"), labels.label("edit/zsre/other")
        ('edits, zsRE', 'harmonic mean', 'other')
    """

    def __init__(self, groups: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._titles = {name: str(group["title"]) for name, group in (groups or {}).items()}
        self._labels: dict[str, str] = {
            f"{name}/{key}": text for name, group in (groups or {}).items() for key, text in group["scores"].items()
        }
        self._places = {key: place for place, key in enumerate(self._labels)}

    def measurement(self, key: str) -> str:
        """Return the name of the measurement that a score belongs to: the first two parts of its key, or one."""
        parts = key.split("/")
        return "/".join(parts[: 2 if parts[0] in ("edit", "ability") and len(parts) > 2 else 1])

    def title(self, key: str) -> str:
        """Return the title of the measurement that a score belongs to."""
        name = self.measurement(key)
        return self._titles.get(name, name)

    def label(self, key: str) -> str:
        """Return the label of a score, or else its key without the measurement's name."""
        return self._labels.get(key, key.removeprefix(self.measurement(key) + "/"))

    def known(self, key: str) -> bool:
        """Whether a score has a label."""
        return key in self._labels

    def place(self, key: str) -> int:
        """Return the position of a score within its measurement; scores without a label come last."""
        return self._places.get(key, len(self._places))
