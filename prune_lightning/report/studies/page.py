"""Writes a study's figure and table into its page, whose text is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prune_lightning.report.table import figure as number

_BEGIN, _END = "<!-- table -->", "<!-- end of table -->"
Cell = str | float | int | None


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table; texts and whole numbers stay as they are, other numbers get three digits.

    Columns of texts are aligned to the left.
    """
    texts = [any(isinstance(row[i], str) for row in rows) for i in range(len(heads))]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" if text else "---:" for text in texts) + " |"]
    for row in rows:
        lines.append("| " + " | ".join(_shown(cell) for cell in row) + " |")
    return "\n".join(lines)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    return number(cell) if isinstance(cell, float) else str(cell)


def write(folder: Path, name: str, table: str, drawing: Figure) -> Path:
    """Write ``NAME.png``, and the table between the marks of ``NAME.md``; a page that does not exist is begun.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawing.savefig(folder / f"{name}.png", dpi=90)
    page = folder / f"{name}.md"
    text = page.read_text("utf-8") if page.is_file() else f"# {name}\n\n![{name}]({name}.png)\n\n{_BEGIN}\n{_END}\n"
    if _BEGIN not in text:
        text += f"\n{_BEGIN}\n{_END}\n"
    before, _, rest = text.partition(_BEGIN)
    page.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{rest.partition(_END)[2]}", "utf-8")
    return page
