"""Facts as users give them: dictionaries, requests, or a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from prune_lightning.data.fields import Fields
from prune_lightning.data.jsonl import request_of
from prune_lightning.data.rows import BadRow, listed
from prune_lightning.errors import UserError, shown
from prune_lightning.records import Row, read_objects, read_text
from prune_lightning.types import EditRequest

Facts: TypeAlias = "str | Path | EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]]"
"""One fact, several facts, or the path of a JSON, JSONL or CSV file of facts."""


def requests_of(facts: Facts, first_id: int = 0) -> list[EditRequest]:
    """Return facts as requests.

    Args:
        facts: See :data:`Facts`. A dictionary has the keys of a line of a JSONL file, see
            :class:`~prune_lightning.data.jsonl.JSONLines`; ``subject``, ``prompt`` and ``target_new`` are needed.
        first_id: ``case_id`` of the first fact without its own; the others follow.

    Raises:
        UserError: A fact cannot be used; all of them are listed, and none is returned.
    """
    found: list[EditRequest] = []
    bad: list[BadRow] = []
    for number, (line, fact) in enumerate(_rows(facts)):
        try:
            found.append(fact if isinstance(fact, EditRequest) else request_of(_fields(fact), first_id + number))
        except UserError as error:
            bad.append(BadRow(line, str(error)))
    if bad:
        raise UserError(listed("these facts cannot be used", bad))
    if not found:
        raise UserError("there are no facts to write")
    return found


def _fields(fact: Any) -> Fields:
    if isinstance(fact, str):  # what is wrong with the row
        raise UserError(fact)
    return Fields(dict(fact))


def _rows(facts: Facts) -> Iterator[tuple[int, Any]]:
    if isinstance(facts, (str, Path)):
        yield from _file(Path(facts).expanduser())
    elif isinstance(facts, (EditRequest, Mapping)):
        yield 1, facts
    elif not isinstance(facts, Iterable):
        raise UserError(f"expected a fact, a list of facts or a file, but got {shown(facts)}")
    else:
        for number, fact in enumerate(facts, start=1):
            known = isinstance(fact, (EditRequest, Mapping))
            yield number, fact if known else f"expected a fact as a dictionary, but got {shown(fact)}"


def _file(path: Path) -> Iterator[Row]:
    yield from _csv(path) if path.suffix.lower() == ".csv" else read_objects(path)


def _csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file whose first line names the columns; empty cells are left out."""
    reader = csv.DictReader(io.StringIO(read_text(path)), restkey="", strict=True)
    try:
        for row in reader:
            if "" in row:
                yield reader.line_num, f"more cells than the {len(reader.fieldnames or ())} columns of the first line"
                continue
            yield reader.line_num, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        yield reader.line_num, f"not CSV: {error}"
