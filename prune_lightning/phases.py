"""Divides the time of a run into disjoint phases whose seconds sum to the wall time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import psutil  # type: ignore[import-untyped]

T = TypeVar("T")
HALF_LIFE = 30.0  # seconds after which a step counts half in the recent pace


class Phase:
    """A named phase of a run. :class:`PhaseClock` creates it.

    Attributes:
        name: Its name.
        seconds: Time spent in this phase itself, without nested phases and parts.
        active: ``seconds`` plus those of its parts.
        done: Number of steps done.
        total: Total number of steps, if known.
    """

    def __init__(self, name: str, settle: Callable[[], None], advanced: Callable[[Phase], None]) -> None:
        self.name, self._settle, self._advanced = name, settle, advanced
        self.seconds = self.active = 0.0
        self.done = 0.0
        self.total: float | None = None
        self._mark = self._recent_seconds = self._recent_steps = 0.0

    def expect(self, total: float, done: float | None = None) -> None:
        """Set the total number of steps.

        Args:
            total: Total number of steps; may be corrected later.
            done: Number of steps that were done earlier. The pace is measured from now on.
        """
        self.total = total
        if done is not None:
            self._settle()
            self.done, self._mark = done, self.active

    def advance(self, steps: float = 1) -> None:
        """Count finished steps."""
        self._settle()
        spent = self.active - self._mark
        weight = 0.5 ** (spent / HALF_LIFE)
        self._recent_seconds = weight * self._recent_seconds + spent
        self._recent_steps = weight * self._recent_steps + steps
        self._mark = self.active
        self.done += steps
        self._advanced(self)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items; each counts as a step when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    @property
    def complete(self) -> bool:
        """Whether all steps are done, or the phase has no steps."""
        return self.total is None or self.done >= self.total

    @property
    def pace(self) -> float | None:
        """Seconds per step, with more weight on recent steps; ``None`` before the first one."""
        return self._recent_seconds / self._recent_steps if self._recent_steps else None

    @property
    def time_left(self) -> float | None:
        """Seconds left: the recent pace times the steps left; ``None`` if unknown."""
        return None if self.total is None or self.pace is None else self.pace * max(0.0, self.total - self.done)


class PhaseWatcher(Protocol):
    """Is notified of the phases of a run."""

    def advanced(self, phase: Phase) -> None:
        """Called when steps of a phase are done."""
        ...

    def ended(self, phase: Phase, outermost: bool) -> None:
        """Called when a phase has ended without an error; it may continue later. ``outermost`` if it was not nested."""
        ...


class PhaseClock:
    """Divides the time of a run into phases.

    At any time exactly one phase runs: entering another one pauses it. So each second belongs to one phase, and the
    phases sum to the time since the clock was started. Time outside all phases counts as ``other``. Progress displays
    and logs only read the clock.

    Args:
        now: Monotonic time, in seconds.
        start: Seconds before the clock was started that count as the phase ``start``; see :func:`process_age`.

    Attributes:
        phases: All phases so far, by name.

    Examples:
        >>> ticks = iter([0.0, 1.0, 3.0, 7.0, 8.0, 9.0])
        >>> clock = PhaseClock(lambda: next(ticks))
        >>> with clock.phase("edit"):  # 1.0
        ...     with clock.phase("evaluate"):  # 3.0 to 7.0
        ...         pass
        >>> clock.seconds()  # edit ended at 8.0
        {'other': 2.0, 'edit': 3.0, 'evaluate': 4.0}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, start: float = 0.0) -> None:
        self._now, self._last = now, now()
        self.phases: dict[str, Phase] = {}
        self._prefix = ""
        if start:
            self.named("start").seconds = start
        self._stack: list[tuple[Phase, bool]] = [(self.named("other"), False)]
        self._watchers: list[PhaseWatcher] = []

    def watch(self, watcher: PhaseWatcher) -> None:
        """Notify a watcher from now on."""
        self._watchers.append(watcher)

    def named(self, name: str) -> Phase:
        """Return a phase by its name, created if it is new."""
        return self._phase(self._prefix + name)

    def _phase(self, name: str) -> Phase:
        if name not in self.phases:
            self.phases[name] = Phase(name, self._settle, self._advanced)
        return self.phases[name]

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Enter a phase; the previous phase continues when it ends."""
        phase = self.named(name)
        with self._entered(phase, part=False):
            yield phase
        if not any(phase is other for other, _ in self._stack):
            for watcher in self._watchers:
                watcher.ended(phase, outermost=len(self._stack) == 1)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Enter a part of the running phase, ``PHASE/NAME``: listed separately, but included in the phase's pace."""
        with self._entered(self._phase(f"{self._stack[-1][0].name}/{name}"), part=True):
            yield

    @contextmanager
    def prefixed(self, prefix: str) -> Iterator[None]:
        """Add a prefix to the names of phases, for work that is repeated."""
        before, self._prefix = self._prefix, self._prefix + prefix
        try:
            yield
        finally:
            self._prefix = before

    @contextmanager
    def _entered(self, phase: Phase, part: bool) -> Iterator[None]:
        self._settle()
        self._stack.append((phase, part))
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def _settle(self) -> None:
        """Add the time since the last call to the running phase."""
        now = self._now()
        spent, self._last = now - self._last, now
        self._stack[-1][0].seconds += spent
        self.current.active += spent

    @property
    def current(self) -> Phase:
        """The running phase, or the phase of a running part."""
        return next(phase for phase, part in reversed(self._stack) if not part)

    def _advanced(self, phase: Phase) -> None:
        for watcher in self._watchers:
            watcher.advanced(phase)

    def spent(self, phase: Phase) -> float:
        """Return the seconds of a phase and its parts up to now; for displays, from any thread."""
        return phase.active + (self._now() - self._last if self.running(phase) else 0.0)

    def running(self, phase: Phase) -> bool:
        """Whether the phase, or a part of it, is running."""
        return self.current is phase

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all phases and parts up to now; they sum to :meth:`wall`."""
        self._settle()
        return {name: phase.seconds for name, phase in self.phases.items()}

    def wall(self) -> float:
        """Return the time since the clock was started, plus ``start``."""
        return sum(self.seconds().values())


def process_age() -> float:
    """Return the seconds since this process began."""
    stat = Path("/proc/self/stat")
    if hasattr(time, "CLOCK_BOOTTIME") and stat.is_file():  # psutil would be wrong by up to a second here
        fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    else:
        age = time.time() - psutil.Process().create_time()
    return max(0.0, age)


def duration(seconds: float) -> str:
    """Return a duration in words.

    >>> [duration(seconds) for seconds in (0.04, 19.2, 400, 9000)]
    ['0.0 s', '19 s', '6.7 min', '2.5 h']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
