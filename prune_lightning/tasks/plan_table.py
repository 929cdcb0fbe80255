"""The table that a plan prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from prune_lightning.costs import Machine, StreamShape


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _span(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def print_plan(
    memory: Mapping[str, float],
    host: Mapping[str, float],
    disk: Mapping[str, float],
    seconds: Mapping[str, float],
    once: float,
    stream: StreamShape,
    rows: str,
    problems: list[str],
) -> None:
    """Print the needs and what does not fit.

    Args:
        memory: Bytes on the device, by purpose.
        host: Bytes in the CPU's memory beside a GPU, by purpose.
        disk: Bytes on disk, by purpose.
        seconds: Seconds per edit, by purpose.
        once: Seconds before the first edit.
        stream: The stream.
        rows: A sentence about the rows of tokens.
        problems: One sentence for each need that does not fit.
    """
    out = Console()
    table = Table(title=f"Plan: {stream.edits} edits, {stream.batch} at a time", title_justify="left")
    table.add_column("")
    table.add_column("predicted", justify="right")
    for title, parts, text in (
        ("memory, peak", memory, size),
        *([("memory of the CPU", host, size)] if host else []),
        ("disk", disk, size),
        ("time per edit", seconds, _span),
    ):
        table.add_row(f"[bold]{title}[/bold]", f"[bold]{text(sum(parts.values()))}[/bold]")
        for name, amount in parts.items():
            table.add_row(f"  {name}", text(amount))
    table.add_row("[bold]all edits[/bold]", _span(sum(seconds.values()) * stream.edits))
    if once:
        table.add_row("[bold]statistics, at most, if not kept yet[/bold]", _span(once))
    out.print(table)
    out.print(rows, highlight=False)
    for problem in problems or ["Everything fits."]:
        out.print(problem, markup=False, highlight=False)


def print_machine(name: str, machine: Machine, range_of_error: str) -> None:
    """Print what the times are computed from, and how far predictions were from measurements."""
    figures = f"{machine.flops / 1e12:.3g} TFLOPS, {machine.bandwidth / 1e9:.3g} GB/s, {machine.overhead * 1e6:.3g} µs"
    out = Console(soft_wrap=True, highlight=False, markup=False)
    out.print(f"Machine: {name} ({figures} per operation).")
    out.print(range_of_error)
