"""Line charts for a page: the places of lines, ticks and labels, which the template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_lightning.report.table import percent
from prune_lightning.report.trajectories import Curve, points

_LINE_HEIGHT = 17  # of a label, in pixels
_CHARACTER = 7.4  # average width of one, in pixels
_TOP, _BOTTOM, _LEFT = 14, 44, 52


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        name: Its label.
        kind: ``run``, ``control`` or ``reference``; decides color, dashes and marks.
        x: Edit counts.
        y: Values; what is not finite leaves a gap.
        band: Low and high of each value; ``None`` where there is no interval.
    """

    name: str
    kind: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float] | None] = ()


@dataclass
class Chart:
    """A chart with everything in its place, in pixels.

    Args:
        width: Width.
        height: Height.
        plot: Left, top, right and bottom of the plot.
        x_ticks: Place and text.
        y_ticks: Place and text.
        lines: The curves.
    """

    width: int
    height: int
    plot: tuple[float, float, float, float]
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    lines: list[Drawn] = field(default_factory=list)


@dataclass
class Drawn:
    """A curve in its place.

    Args:
        name: Its label.
        kind: See :class:`Series`.
        path: SVG path of the curve.
        band: SVG path of its intervals; empty without them.
        marks: Place of each value, and what it says.
        last: The last value as text.
        label: Place of the label.
    """

    name: str
    kind: str
    path: str
    band: str
    marks: list[tuple[float, float, str]]
    last: str
    label: tuple[float, float] = (0.0, 0.0)


def series(key: str, curves: Mapping[str, tuple[str, Curve, Curve]], few: int = 0) -> list[Series]:
    """Return the curves of a score that have at least two values.

    Args:
        key: The score.
        curves: By label: the kind, the scores at each count, and their intervals.
        few: Edit count below which there are too few cases for an interval.
    """
    result = []
    for name, (kind, curve, intervals) in curves.items():
        x, y = points(curve, key)
        bounds = {entry["num_requests"]: entry.get(key) for entry in intervals if entry["num_requests"] >= few}
        band = [tuple(b) if (b := bounds.get(count)) and None not in b else None for count in x]
        if sum(map(math.isfinite, y)) >= 2:
            result.append(Series(name, kind, x, y, band))
    return result


def draw(
    lines: Sequence[Series], width: int, height: int, share: bool = False, labelled: bool = True, first: int = 0
) -> Chart:
    """Return a chart over the number of edits, on a nearly logarithmic axis.

    Args:
        lines: The curves; ``reference`` ones are drawn over the whole width.
        width: Width in pixels.
        height: Height in pixels.
        share: Whether the values are shares: the axis is then that of 0 to 100 %.
        labelled: Whether each curve has a label at its end.
        first: Smallest edit count.
    """
    text = percent if share else _short
    words = max((len(f"{line.name}") for line in lines), default=0)
    margin = min(_CHARACTER * max(words, 6) + 18, 0.42 * width) if labelled else 14
    left, top, right, bottom = _LEFT, _TOP, width - margin, height - _BOTTOM
    chart = Chart(width, height, (left, top, right, bottom))
    values = [v for line in lines for v in _finite(line)]
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if share and max(values, default=0) <= 1.0001 else _nice(values)
    low, high = min([*ticks, *values]), max([*ticks, *values])
    counts = sorted({int(x) for line in lines for x in line.x})
    last = max([*counts, first + 1])

    def at_x(count: float) -> float:
        start = math.log2(1 + first)
        return left + (right - left) * (math.log2(1 + count) - start) / (math.log2(1 + last) - start)

    def at_y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / ((high - low) or 1.0)

    chart.x_ticks = [(at_x(count), f"{count:,}") for count in _spaced(counts, at_x)]
    chart.y_ticks = [(at_y(tick), text(tick) if share else f"{tick:g}") for tick in ticks]
    chart.lines = [_drawn(line, at_x, at_y, text) for line in lines]
    _place_labels(chart.lines, right + 10, top, bottom)
    return chart


def _short(value: float) -> str:
    return f"{value:.3g}"


def _finite(line: Series) -> list[float]:
    bounds = [value for pair in line.band if pair for value in pair]
    return [value for value in (*line.y, *bounds) if math.isfinite(value)]


def _nice(values: Iterable[float]) -> list[float]:
    """Return four to six round numbers from 0, or from below the least value, to above the greatest.

    >>> _nice([0.0, 83.5])
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    low, high = min([0.0, *values]), max([0.0, *values])
    if high - low <= 0 or not math.isfinite(high - low):
        return [0.0, 1.0]
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _spaced(counts: Sequence[int], at_x: Callable[[float], float]) -> list[int]:
    """Return the counts whose labels do not touch; the last one is always among them."""
    shown: list[int] = []
    for count in sorted(counts, reverse=True):
        if not shown or at_x(shown[-1]) - at_x(count) > _CHARACTER * (len(f"{count:,}{shown[-1]:,}") / 2 + 1.5):
            shown.append(count)
    return shown[::-1]


def _drawn(
    line: Series, at_x: Callable[[float], float], at_y: Callable[[float], float], text: Callable[[Any], str]
) -> Drawn:
    path, gap = [], True
    marks = []
    for x, y in zip(line.x, line.y, strict=True):
        if not math.isfinite(y):
            gap = True
            continue
        path.append(f"{'M' if gap else 'L'}{at_x(x):.1f} {at_y(y):.1f}")
        marks.append((round(at_x(x), 1), round(at_y(y), 1), f"{line.name}, {int(x):,} edits: {text(y)}"))
        gap = False
    banded = [(x, *pair) for x, pair in zip(line.x, line.band, strict=False) if pair]
    band = ""
    if len(banded) > 1:
        edge = [(x, high) for x, _, high in banded] + [(x, low) for x, low, _ in reversed(banded)]
        band = "M" + "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in edge) + "Z"
    last = next((y for y in reversed(line.y) if math.isfinite(y)), math.nan)
    end = marks[-1][1] if marks else 0.0
    return Drawn(line.name, line.kind, "".join(path), band, marks, text(last), (0.0, end))


def _place_labels(lines: Sequence[Drawn], x: float, top: float, bottom: float) -> None:
    """Put the two-line labels beside the ends of the curves, without touching each other."""
    order = sorted(lines, key=lambda line: line.label[1])
    height = 2 * _LINE_HEIGHT + 4
    places = [line.label[1] for line in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + height)
    limit = bottom - _LINE_HEIGHT - 8
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - height
    for line, place in zip(order, places, strict=True):
        line.label = (x, max(place, top))
