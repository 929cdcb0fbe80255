"""Objects in JSON, JSONL and TSV files, with line numbers for messages about bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prune_lightning.errors import UserError, near_path

Row = tuple[int, dict[str, Any] | str]
"""A line number, and the record that begins there or a text that describes what is wrong with it."""
_FOREIGN = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, after `surrogateescape`


def read_objects(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array, of a JSONL file, or of objects over several lines.

    Args:
        path: The file, UTF-8, with or without a byte-order mark. A record with other bytes is a bad row.

    Raises:
        UserError: See :func:`read_text`.
    """
    text = _decoded(path)
    start = text.lstrip()[:1]
    if start == "[":
        yield from _values(text, text.index("[") + 1, closing="]")
    elif start == "{" and _is_spread(text):
        yield from _values(text, text.index("{"))
    else:
        yield from _lines(text)


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
    text = _decoded(path)
    if bad := _FOREIGN.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise UserError(f"{str(path)!r} is not UTF-8 text: line {line} has the byte 0x{_byte(bad):02x}")
    return text


def _decoded(path: Path) -> str:
    """Return a file's text, with a surrogate for each byte that is not UTF-8."""
    try:
        raw = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if raw is None:
        raise UserError(f"no file {str(path)!r}; {near_path(path)}")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{str(path)!r} is not UTF-8 text but UTF-16: save it as UTF-8")
    return raw.decode("utf-8-sig", errors="surrogateescape").replace("\r\n", "\n").replace("\r", "\n")


def _byte(found: re.Match[str]) -> int:
    return ord(found.group()) - 0xDC00


def _checked(line: int, record: Any, source: str) -> Row:
    if bad := _FOREIGN.search(source):
        return line + source.count("\n", 0, bad.start()), f"not UTF-8 text: it has the byte 0x{_byte(bad):02x}"
    return line, record if isinstance(record, dict) else f"expected an object, but got {type(record).__name__}"


def _lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # JSONL has no other line separator
        if line.strip():
            try:
                yield _checked(number, json.loads(line), line)
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON: {error}"


def _is_spread(text: str) -> bool:
    """Whether the first object of a file spans several lines."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        with suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder().raw_decode(text, text.index("{"))
            return "\n" in text[text.index("{") : end]
    return False


def _values(text: str, position: int, closing: str = "") -> Iterator[Row]:
    """Yield the objects of an array, or of a sequence without brackets (no ``closing``)."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            if closing:
                yield line, "the array is not closed: the file is cut off"
            return
        if closing and text[position] == closing:
            return
        try:
            record, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON, and nothing after it can be read: {error}"
            return
        yield _checked(line, record, text[position:end])
        position = end
