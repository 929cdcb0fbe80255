"""Objects in JSON, JSONL, CSV and TSV files, with line numbers for messages about bad ones."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prune_lightning.errors import UserError, near_path, shown

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


def read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a comma-separated file whose first line names the columns; a quoted field can span lines.

    Args:
        path: The file, UTF-8.

    Raises:
        UserError: See :func:`read_text`.
    """
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    names: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield line, f"not CSV, and nothing after it can be read: {error}"
            return
        if cells is None:
            return
        if not names:
            names = cells
        elif cells:
            fits = len(cells) == len(names)
            yield line, dict(zip(names, cells, strict=True)) if fits else f"{len(cells)} columns, not {len(names)}"
        line = reader.line_num + 1


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


class _Reader:
    """Decodes one JSON value after another. An object with a key that occurs twice would lose one of the values."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self._repeated += [key for key, count in counts.items() if count > 1]
        return found

    def read(self, text: str, position: int, line: int) -> tuple[Row, int]:
        """Return the value that begins at a position, as a row, and the position after it."""
        self._repeated.clear()
        record, end = self._decoder.raw_decode(text, position)
        source = text[position:end]
        if bad := _FOREIGN.search(source):
            line += source.count("\n", 0, bad.start())
            return (line, f"not UTF-8 text: it has the byte 0x{_byte(bad):02x}"), end
        if not isinstance(record, dict):
            return (line, f"expected an object, but got {shown(record)}"), end
        if self._repeated:
            return (line, f"the key {self._repeated[0]!r} occurs twice in one object"), end
        return (line, record), end


def _lines(text: str) -> Iterator[Row]:
    reader = _Reader()
    for number, line in enumerate(text.split("\n"), start=1):  # JSONL has no other line separator
        if line.strip():
            try:
                row, end = reader.read(line, len(line) - len(line.lstrip()), number)
                rest = line[end:].strip()
                yield (number, f"not JSON: {shown(rest, 40)} follows the end of the object") if rest else row
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
    reader = _Reader()
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
            if rest := text[position + 1 :].strip():
                line += text.count("\n", position, text.index(rest, position + 1))
                yield line, f"{shown(rest, 40)} follows the end of the array, and is not read"
            return
        try:
            row, position = reader.read(text, position, line)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON, and nothing after it can be read: {error}"
            return
        yield row
