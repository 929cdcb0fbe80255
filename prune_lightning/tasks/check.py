"""The job that reads a data file and lists every record that cannot be used, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from prune_lightning.atomic_files import write_json
from prune_lightning.data.stream import BadRow, EditStream
from prune_lightning.errors import UserError
from prune_lightning.tasks.setup import quieten, run_folder
from prune_lightning.types import EditRequest


def run(config: DictConfig) -> None:
    """List the bad records, count the others, and leave both in `check.json`.

    Raises:
        UserError: A record cannot be used, or none can; the command line ends with 2.
    """
    quieten()
    folder = run_folder()
    stream: EditStream = instantiate(config.data)
    requests, rejected = sorted_out(stream)
    counts = survey(stream, requests, rejected)
    out = Console(markup=False, highlight=False, soft_wrap=True)
    for row in rejected:
        out.print(f"line {row.line}: {row.reason}")
    table = Table("", "records", title="Data", title_justify="left")
    for name, count in counts.items():
        table.add_row(name, str(count))
    out.print(table)
    write_json(folder / "check.json", {"counts": counts, "rejected": [vars(row) for row in rejected]})
    if rejected:
        raise UserError(f"{len(rejected)} of {counts['records']} records cannot be used; they are listed above")
    if not requests:
        raise UserError("the data hold no record")


def sorted_out(stream: EditStream) -> tuple[list[EditRequest], list[BadRow]]:
    """Return the requests of a stream in their source's order, and what cannot be used."""
    requests: list[EditRequest] = []
    rejected: list[BadRow] = []
    for record in stream.records():
        if isinstance(record, BadRow):
            rejected.append(record)
        else:
            requests.append(record)
    return requests, rejected


def survey(stream: EditStream, requests: Sequence[EditRequest], rejected: Sequence[BadRow]) -> dict[str, Any]:
    """Return how many records there are, and how many lack what a score needs."""
    subjects = {request.subject.lower() for request in requests}
    kept = len(stream.ordered(list(requests)))
    return {
        "records": len(requests) + len(rejected),
        "usable": len(requests),
        "unusable": len(rejected),
        "with the subject of another": len(requests) - len(subjects),
        "without old target": sum(request.target_old is None for request in requests),
        "without paraphrases": sum(not request.paraphrases for request in requests),
        "without locality": sum(not request.locality for request in requests),
        "taken by a run": min(kept, kept if stream.num_edits is None else stream.num_edits),
    }
