"""The job that reads a data file and lists all unusable and doubtful records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from prune_lightning.atomic_files import write_json
from prune_lightning.data.rows import BadRow, Located
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.models.loading import load_tokens
from prune_lightning.tasks.components import build
from prune_lightning.tasks.setup import quieten, run_folder, usable_by
from prune_lightning.types import EditRequest


def run(config: DictConfig) -> None:
    """List the bad and the doubtful records, count the others, and write the result to `check.json`.

    Raises:
        UserError: A record cannot be used, or there is none; the command line then exits with 2.
    """
    quieten()
    folder = run_folder()
    stream: EditStream = build(config.data, "data")
    usable, rejected = stream.read()
    out = Console(markup=False, highlight=False, soft_wrap=True)
    usable, misfits = _fitting(config, stream, usable, out)
    rejected = sorted([*rejected, *misfits], key=lambda row: row.line)
    kept, repeated = stream.arranged(usable)
    counts = survey(stream, [one.request for one in usable], rejected, kept)
    remarks = [BadRow(one.line, remark) for one in usable for remark in one.remarks]
    for row in rejected:
        out.print(f"line {row.line}: {row.reason}")
    for title, rows in (("doubtful", remarks), ("left out", repeated)):
        for row in rows:
            out.print(f"{title}: line {row.line}: {row.reason}")
    table = Table("", "records", title="Data", title_justify="left")
    for name, count in counts.items():
        table.add_row(name, str(count))
    out.print(table)
    found = {"rejected": rejected, "left_out": repeated, "remarks": remarks}
    write_json(
        folder / "check.json", {"counts": counts} | {name: [vars(row) for row in rows] for name, rows in found.items()}
    )
    if rejected:
        total = counts["records"]
        raise UserError(f"{len(rejected)} of {total} records cannot be used; they are listed above")
    if not usable:
        raise UserError("the data hold no record")


def _fitting(
    config: DictConfig, stream: EditStream, usable: list[Located], out: Console
) -> tuple[list[Located], list[BadRow]]:
    """Return the records that fit the model, and the others; all fit if the tokenizer cannot be loaded."""
    try:
        tokens = load_tokens(str(config.model.path), config.model.revision)
    except UserError as error:
        out.print(f"not checked against the model: {error}")
        return usable, []
    return stream.fitting(usable, tokens, usable_by(config.method))


def survey(
    stream: EditStream, requests: Sequence[EditRequest], rejected: Sequence[BadRow], kept: Sequence[Located]
) -> dict[str, Any]:
    """Return the number of records, of those that lack the fields of a score, and of groups and their questions."""
    subjects, groups = {request.subject.lower() for request in requests}, stream.groups()
    return {
        "records": len(requests) + len(rejected),
        "usable": len(requests),
        "unusable": len(rejected),
        "with the subject of another": len(requests) - len(subjects),
        "without old target": sum(request.target_old is None for request in requests),
        "without paraphrases": sum(not request.paraphrases for request in requests),
        "without locality": sum(not request.locality for request in requests),
        "groups with questions": len(groups),
        "questions of groups": sum(len(group.questions) for group in groups),
        "taken by a run": min(len(kept), len(kept) if stream.num_edits is None else stream.num_edits),
    }
