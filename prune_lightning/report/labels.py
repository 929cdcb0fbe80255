"""Display names of scores, as each measurement defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUANTITIES = ("efficacy", "generalization", "locality", "retention")
_LAST = "stream"  # stands for a quantity only if no other measurement does


def shown_name(option: str, kind: str = "") -> str:
    """Return the name of a method or a restraint as papers write it.

    Args:
        option: Name of its configuration.
        kind: Name of its class.

    >>> shown_name("alphaedit", "AlphaEdit"), shown_name("r_rome", "RROME"), shown_name("prune")
    ('AlphaEdit', 'R-ROME', 'PRUNE')
    """
    return kind if kind.lower() == option.lower() else option.upper().replace("_", "-")


@dataclass(frozen=True)
class Quantity:
    """The score that stands for one of the four quantities of a run.

    Args:
        name: One of :data:`QUANTITIES`.
        key: The score.
        meaning: What a value of 100 % means, as a sentence.
    """

    name: str
    key: str
    meaning: str


class Labels:
    """Titles of measurements, labels of their scores, and which scores matter most.

    Args:
        groups: By the name of a measurement: its ``title``; ``scores``, labels by key; ``headlines``, by quantity the
            key of its ``score`` and the ``meaning``; ``short``, keys for a short table; and ``lower``, keys of scores
            for which lower is better. This is ``labels`` in a run's summary.

    Examples:
        >>> labels = Labels({"edit/zsre": {"title": "edits, zsRE", "scores": {"harmonic": "harmonic mean"}}})
        >>> labels.title("edit/zsre/harmonic"), labels.label("edit/zsre/harmonic"), labels.label("edit/zsre/some_other")
        ('edits, zsRE', 'harmonic mean', 'some other')
    """

    def __init__(self, groups: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._groups = {name: dict(group) for name, group in (groups or {}).items()}
        self._labels: dict[str, str] = {
            f"{name}/{key}": text for name, group in self._groups.items() for key, text in group["scores"].items()
        }
        self._places = {key: place for place, key in enumerate(self._labels)}
        self._lower = {f"{name}/{key}" for name, group in self._groups.items() for key in group.get("lower", ())}

    def measurement(self, key: str) -> str:
        """Return the name of the measurement that a score belongs to: the first two parts of its key, or one."""
        parts = key.split("/")
        return "/".join(parts[: 2 if parts[0] in ("edit", "ability") and len(parts) > 2 else 1])

    def title(self, key: str) -> str:
        """Return the title of the measurement that a score belongs to."""
        name = self.measurement(key)
        return str(self._groups[name]["title"]) if name in self._groups else name

    def label(self, key: str) -> str:
        """Return the label of a score, or else the words of its key without the measurement's name."""
        if key in self._labels:
            return self._labels[key]
        if prefix := self._prefix(key):
            return f"{self._labels[prefix]}, {key.removeprefix(prefix)}"
        return key.removeprefix(self.measurement(key) + "/").removeprefix("num_").replace("_", " ")

    def _prefix(self, key: str) -> str | None:
        parts = key.split("/")
        prefixes = ("/".join(parts[:end]) + "/" for end in range(len(parts) - 1, 0, -1))
        return next((prefix for prefix in prefixes if prefix in self._labels), None)

    def known(self, key: str) -> bool:
        """Whether a score has a label."""
        return key in self._labels

    def place(self, key: str) -> int:
        """Return the position of a score within its measurement; scores without a label come last."""
        return self._places.get(key, self._places.get(self._prefix(key) or "", len(self._places)))

    def counter(self, key: str) -> bool:
        """Whether a score counts failures, such as values that are not finite."""
        return key.rpartition("/")[2].startswith("num_")

    def higher_is_better(self, key: str) -> bool | None:
        """Whether a higher value is better; ``None`` if that is not known."""
        if self.counter(key) or key in self._lower or self._prefix(key) in self._lower:
            return False
        return True if self.known(key) else None

    def arrow(self, key: str) -> str:
        """Return an arrow that points to the better values; empty if that is not known."""
        better = self.higher_is_better(key)
        return "" if better is None else "↑" if better else "↓"

    def quantities(self, scores: Mapping[str, Any]) -> dict[str, Quantity]:
        """Return the score that stands for each quantity, among those that have a value.

        Args:
            scores: Scores by key.
        """
        found: dict[str, Quantity] = {}
        for name in sorted(self._groups, key=lambda name: name == _LAST):
            for quantity, headline in self._groups[name].get("headlines", {}).items():
                key = f"{name}/{headline['score']}"
                value = scores.get(key)
                if value is not None and value == value:
                    found.setdefault(quantity, Quantity(quantity, key, headline["meaning"]))
        return {name: found[name] for name in QUANTITIES if name in found}

    def short(self, scores: Mapping[str, Any], most: int) -> list[str]:
        """Return the keys of the most important scores: the quantities, the first of each measurement, and so on.

        Args:
            scores: Scores by key.
            most: Largest number of keys.
        """
        chosen = dict.fromkeys(quantity.key for quantity in self.quantities(scores).values())
        lists = [[f"{name}/{key}" for key in group.get("short", ())] for name, group in self._groups.items()]
        for rank in range(max(map(len, lists), default=0)):
            chosen |= dict.fromkeys(keys[rank] for keys in lists if rank < len(keys) and keys[rank] in scores)
        rest = sorted((key for key in scores if not self.counter(key)), key=lambda key: not self.known(key))
        return list(dict.fromkeys([*chosen, *rest]))[:most]
