"""Figures as JSON that every reader accepts: what is not finite becomes ``null``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def nan_to_null(value: Any) -> Any:
    """Return ``value`` with NaN and infinities replaced by ``None``, at any depth.

    >>> nan_to_null({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all.

    Args:
        path: The file.
        value: Plain data.
    """
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(nan_to_null(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    partial.replace(path)


def append_lines(path: Path, lines: Iterable[Any]) -> None:
    """Append lines of JSON to a file.

    Args:
        path: The file.
        lines: Plain data without NaN.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(_json_lines(lines))


def replace_lines(path: Path, lines: Iterable[Any]) -> None:
    """Have a file hold these lines of JSON only; until they are all written it is what it was.

    Args:
        path: The file.
        lines: Plain data without NaN.
    """
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(_json_lines(lines), "utf-8")
    partial.replace(path)


def _json_lines(lines: Iterable[Any]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
