"""Objects in JSON, JSONL and TSV files, with the line of each, so that a bad one can be found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_lightning.errors import UserError, near

Row = tuple[int, dict[str, Any] | str]
"""A line, and the record that begins there; a text in place of the record says what is wrong with it."""


def read_objects(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array or a JSONL file.

    Args:
        path: The file, UTF-8, with or without a byte-order mark.

    Raises:
        UserError: See :func:`read_text`.
    """
    text = read_text(path)
    yield from _array(text) if text.lstrip().startswith("[") else _lines(text)


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a tab-separated file whose first line names the columns; quotes have no meaning, as in GLUE.

    Args:
        path: The file, UTF-8.

    Raises:
        UserError: See :func:`read_text`.
    """
    names: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        cells = line.rstrip("\r").split("\t")
        if not names:
            names = cells
        elif line.strip():
            fits = len(cells) == len(names)
            yield number, dict(zip(names, cells, strict=True)) if fits else f"{len(cells)} columns, not {len(names)}"


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        UserError: There is no such file (the message names near matches), or it is not UTF-8, or cannot be read.
    """
    try:
        text = path.read_text("utf-8-sig") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if text is None:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f"; {near(path.name, siblings)}" if siblings else f"; there is no folder {str(path.parent)!r} either"
        raise UserError(f"no file {str(path)!r}{hint}")
    return text


def _checked(line: int, record: Any) -> Row:
    return line, record if isinstance(record, dict) else f"expected an object, but got {type(record).__name__}"


def _lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # nothing else ends a line in JSONL
        if line.strip():
            try:
                yield _checked(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON: {error}"


def _array(text: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position >= len(text):
            yield line, "the array is not closed: the file is cut off"
            return
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON, and nothing after it can be read: {error}"
            return
        yield _checked(line, record)
