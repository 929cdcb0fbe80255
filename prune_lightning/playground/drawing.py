"""Where the marks of a spectrum lie in its drawing."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lightning.editor.history import Spectrum

SHOWN = 40
"""Most singular values that are drawn: the largest ones."""
_WIDTH, _HEIGHT = 560.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 18.0, 34.0


@dataclass(frozen=True)
class Mark:
    """One singular value: ``x``, and ``y`` before and after the law."""

    index: int
    x: float
    before: float
    after: float
    value_before: float
    value_after: float

    @property
    def moved(self) -> bool:
        """Whether the law changes it."""
        return self.value_after != self.value_before


@dataclass(frozen=True)
class Drawing:
    """A spectrum as marks in a box of :attr:`width` by :attr:`height`.

    Args:
        name: Name of the weight.
        marks: The largest singular values.
        ticks: Position and text of the vertical axis.
        reference: Position of the line of the original weight's largest singular value.
        reference_value: That value.
        num_above: How many singular values are above it.
        num_moved: How many of them the law changes.
        total: Number of singular values that are not zero.
    """

    name: str
    marks: list[Mark]
    ticks: list[tuple[float, str]]
    reference: float
    reference_value: float
    num_above: int
    num_moved: int
    total: int
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _WIDTH - _RIGHT
    bottom: float = _HEIGHT - _BOTTOM

    @classmethod
    def of(cls, spectrum: Spectrum) -> Drawing:
        """Return the drawing of a spectrum."""
        before, after = spectrum.before.tolist(), spectrum.after.tolist()
        step = _step(max([spectrum.reference, *before[:1], *after[:1]]))
        top = step * 4

        def y(value: float) -> float:
            return round(_HEIGHT - _BOTTOM - value / top * (_HEIGHT - _BOTTOM - _TOP), 2)

        shown = list(zip(before, after, strict=True))[:SHOWN]
        gap = (_WIDTH - _LEFT - _RIGHT) / max(len(shown), 8)
        marks = [
            Mark(index + 1, round(_LEFT + gap * (index + 0.5), 2), y(old), y(new), old, new)
            for index, (old, new) in enumerate(shown)
        ]
        return cls(
            spectrum.name,
            marks,
            [(y(step * i), f"{step * i:g}") for i in range(5)],
            y(spectrum.reference),
            spectrum.reference,
            sum(value > spectrum.reference for value in before),
            sum(new != old for old, new in zip(before, after, strict=True)),
            len(before),
        )


def _step(largest: float) -> float:
    """Return a round quarter of an axis from zero that holds a value.

    >>> _step(17.5), _step(2.6), _step(0.07)
    (5.0, 1.0, 0.02)
    """
    step = 10.0**-9
    while True:
        for factor in (1, 2, 2.5, 5):
            if step * factor * 4 >= largest * 1.05:
                return float(f"{step * factor:.3g}")
        step *= 10
