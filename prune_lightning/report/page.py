"""The self-contained HTML page of a run."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from prune_lightning.report.labels import Labels
from prune_lightning.report.table import rows


def write_page(
    path: Path,
    title: str,
    columns: Mapping[str, Mapping[str, Any]],
    plots: Sequence[Path],
    config: str,
    remarks: Sequence[str] = (),
    labels: Labels | None = None,
) -> None:
    """Write the page; whatever comes from data or configuration is escaped.

    Args:
        path: The HTML file.
        title: Heading.
        columns: Scores by column title.
        plots: PNG files, embedded.
        config: The composed configuration as YAML.
        remarks: Sentences shown below the table.
        labels: Names of scores; their keys if not given.
    """
    environment = Environment(loader=PackageLoader("prune_lightning", "report"), autoescape=True)
    images = [{"name": plot.stem, "data": base64.b64encode(plot.read_bytes()).decode("ascii")} for plot in plots]
    page = environment.get_template("page.html.j2").render(
        title=title, columns=list(columns), groups=rows(columns, labels), remarks=remarks, images=images, config=config
    )
    path.write_text(page, "utf-8")
