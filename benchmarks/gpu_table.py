"""Print a short table of what benchmarks/on_gpu.sh left in a folder: `python benchmarks/gpu_table.py FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def rows(name: str, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is shown of a part's file: what, and how much."""
    if name == "editing":
        for entry in found["records"]:
            parts = {part: share for part, share in entry["shares"].items() if part != "seconds"}
            shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in parts.items())
            ratio = f", {entry['ratio']:.1f} times the plain path" if "ratio" in entry else ""
            speed = f"{entry['edits_per_second']:.2f} edits/s{ratio}"
            peak = f", {entry['peak_gib']:.1f} GiB" if entry["peak_gib"] else ""
            what = f"{entry['method']}, batch {entry['batch']}{', CUDA graph' if entry['graph'] else ''}"
            yield what, f"{speed}{peak}; {shares}"
    elif name.startswith("restraint"):
        for entry in found["records"]:
            ratio = f", {entry['ratio']:.1f} times" if entry["ratio"] == entry["ratio"] else ""
            yield f"{entry['shape']}, {entry['case']}", f"{entry['seconds']:.3g} s{ratio}"
    elif name.startswith("stream"):
        text = f"{found['edits']} edits in {found['seconds']:.0f} s; last tenth / first {found['last_over_first']:.2f}"
        yield found["arguments"]["method"], text
    elif name in ("job", "smollm2"):
        phases = ", ".join(
            f"{phase} {seconds:.1f}" for phase, seconds in found.get("phases", {}).items() if seconds > 0.5
        )
        done = phases or f"stopped after {found['num_requests']} edits"
        yield " ".join(found["arguments"])[:60], f"{found['wall_s']:.1f} s: {done}"
    elif name == "machine":
        yield "card", f"{found['card']}, {found['cores']} cores, torch {found['torch']}"


def main() -> None:
    """Print the table."""
    table = Table("part", "what", "how much")
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        try:
            for what, much in rows(path.stem, json.loads(path.read_text())):
                table.add_row(path.stem, what, much)
        except (KeyError, TypeError, ValueError) as error:  # of a part that failed; the others are shown
            table.add_row(path.stem, "cannot be read", repr(error))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
