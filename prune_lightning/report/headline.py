"""What a run comes to: one sentence, and the four quantities with interval, number of cases and control run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prune_lightning.report.labels import QUANTITIES, Labels, shown_name
from prune_lightning.report.table import percent

ENOUGH = 10
"""Fewest cases for a bootstrap interval to be shown: that of one case has no width."""
_MEANING = {
    "efficacy": "Edits that hold.",
    "generalization": "Edits that hold after paraphrases, too.",
    "locality": "Unrelated answers that stay the same.",
    "retention": "Abilities kept.",
}


@dataclass(frozen=True)
class Tile:
    """One of the four quantities at the end of a run.

    Args:
        quantity: Its name.
        key: The score that stands for it; ``None`` if it was not measured.
        label: The score's name.
        meaning: What a value of 100 % means.
        value: The value.
        interval: Its 95 % interval; ``None`` with fewer than :data:`ENOUGH` cases.
        n: Number of cases; ``None`` if not known.
        unit: What a case is.
        before: The unedited model's value.
        control: The control run's value.
        difference: The value minus that of the control run.
        difference_interval: The 95 % interval of the paired difference.
    """

    quantity: str
    key: str | None = None
    label: str = ""
    meaning: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    unit: str = "edits"
    before: float | None = None
    control: float | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None

    def cases(self) -> str:
        """Return the number of cases in words, and what it means for the interval."""
        if self.n is None:
            return ""
        unit = self.unit.removesuffix("s") if self.n == 1 else self.unit
        return f"{self.n:,} {unit}" + (", too few for an interval" if self.n < ENOUGH else "")

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` than the control run; empty if the difference's interval holds 0."""
        low, high = self.difference_interval or (0.0, 0.0)
        return "better" if low > 0 else "worse" if high < 0 else ""

    def versus(self) -> str:
        """Return how the value compares with that of the control run, in words."""
        if self.difference is None:
            return ""
        size = round(100 * abs(self.difference))
        return f"{size} point{'s' * (size != 1)} {self.verdict}" if self.verdict else "no clear difference"


def points(value: float) -> str:
    """Return a difference of shares in percentage points, with a sign.

    >>> points(0.63), points(-0.046), points(-0.001)
    ('+63', '−5', '±0')
    """
    number = round(100 * value)
    return f"{number:+d}".replace("-", "−") if number else "±0"


def names(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the method and of the restraint of a run or of a ledger's base; the latter may be empty."""
    titles = summary.get("titles", {})
    method, restraint = str(summary.get("method", "")), str(summary.get("restraint", "") or "none")
    kinds = {name: str((summary.get(f"{name}_options") or {}).get("_target_", "")) for name in ("method", "restraint")}
    return (
        titles.get("method") or shown_name(method, kinds["method"].rpartition(".")[2]),
        "" if restraint == "none" else shown_name(restraint, kinds["restraint"].rpartition(".")[2]),
    )


def tiles(summary: Mapping[str, Any]) -> list[Tile]:
    """Return the four quantities of a run.

    Args:
        summary: The run's summary.
    """
    labels, final = Labels(summary.get("labels")), summary.get("final", {})
    control = summary.get("control") or {}
    found = labels.quantities(final)
    result = []
    for name in QUANTITIES:
        if name not in found:
            result.append(Tile(name, meaning=_MEANING[name]))
            continue
        key, n = found[name].key, summary.get("num_cases", {}).get(found[name].key)
        bounds = (summary.get("intervals") or [{}])[-1].get(key)
        difference = _pair(control.get("differences", {}).get(key), 3)
        enough = n is None or n >= ENOUGH
        theirs = control.get("final", {}).get(key)
        result.append(
            Tile(
                name,
                key,
                labels.label(key),
                found[name].meaning,
                value=final[key],
                interval=_pair(bounds, 2) if enough else None,
                n=n,
                unit="items" if name == "retention" else "prompts" if key.startswith("stream/locality") else "edits",
                before=summary.get("baseline", {}).get(key),
                control=theirs,
                difference=None if theirs is None else final[key] - theirs,
                difference_interval=difference[1:] if difference and enough else None,
            )
        )
    return result


def _pair(values: Any, length: int) -> Any:
    """Return finite bounds as a tuple."""
    fits = isinstance(values, (list, tuple)) and len(values) == length and None not in values
    return tuple(values) if fits and all(value == value for value in values) else None


def sentence(summary: Mapping[str, Any]) -> str:
    """Return what a run comes to.

    Args:
        summary: The run's summary.

    Example:
        >>> final = {"edit/x/hits": 0.86}
        >>> headlines = {"efficacy": {"score": "hits", "meaning": "It holds."}}
        >>> labels = {"edit/x": {"title": "x", "scores": {"hits": "hits"}, "headlines": headlines}}
        >>> about = {"method": "rome", "restraint": "prune", "num_requests": 100, "labels": labels, "final": final}
        >>> sentence({**about, "control": {"final": {"edit/x/hits": 0.83}}}).replace(chr(160), " ")
        'ROME with PRUNE, 100 edits: 86 % hold (83 % without PRUNE).'
    """
    method, restraint = names(summary)
    count = int(summary.get("num_requests", 0))
    edits = f"{count:,} edit{'s' * (count != 1)}"
    if summary.get("protocol") in ("single", "batch"):
        edits += ", each from the unedited model" if summary["protocol"] == "single" else " in separate batches"
    who = f"{method} with {restraint}" if restraint else f"{method} without a restraint"
    by_name = {tile.quantity: tile for tile in tiles(summary)}
    parts = []
    for quantity, words in (("efficacy", "{} hold"), ("retention", "{} of the abilities kept")):
        tile = by_name[quantity]
        if tile.key:
            without = f" ({percent(tile.control)} without {restraint})" if tile.control is not None else ""
            parts.append(words.format(percent(tile.value)) + without)
    return f"{who}, {edits}: {'; '.join(parts)}." if parts else f"{who}, {edits}."
