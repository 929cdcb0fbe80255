"""A progress display of the phases of a run, with the estimated time left for each."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from prune_lightning.phases import Phase, PhaseClock, duration


class RunProgress:
    """Shows the phases of a clock inside the block. It reads the clock and has no state of its own.

    Parts of phases are not shown. The time left is the recent time per step times the number of steps left.

    Args:
        clock: The clock.
        console: Where to draw; the terminal by default.
        transient: Whether to remove the display at the end.
    """

    def __init__(self, clock: PhaseClock, console: Console | None = None, transient: bool = False) -> None:
        self.clock = clock
        self._spinner = Spinner("dots")
        console = console or Console(stderr=True)
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=5, transient=transient)

    def __enter__(self) -> RunProgress:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()
        if not self._live.console.is_terminal and not self._live.transient:
            self._live.console.line()  # in a file the display has no line break at its end

    def table(self) -> Table:
        """Return one row per phase: its state, name, steps, time spent and time left."""
        table = Table.grid(padding=(0, 1))
        for phase in list(self.clock.phases.values()):
            if phase.active:
                table.add_row(*self._row(phase))
        return table

    def _row(self, phase: Phase) -> tuple[Spinner | Text, Text, ProgressBar | Text, Text, Text]:
        running = self.clock.running(phase)
        state = self._spinner if running else Text("✓" if phase.complete else " ", style="green")
        spent = duration(self.clock.spent(phase))
        if not phase.total:
            return state, Text(phase.name), Text(), Text(), Text(spent, style="progress.elapsed")
        left = f", {duration(phase.time_left)} left" if phase.time_left else ""
        return (
            state,
            Text(phase.name),
            ProgressBar(phase.total, phase.done, width=40),
            Text(f"{phase.done:,.0f}/{phase.total:,.0f}", style="progress.download"),
            Text(spent + left, style="progress.remaining"),
        )
