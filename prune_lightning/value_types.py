"""Values of a configuration against types, and words for these types."""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from prune_lightning.errors import UserError, shown

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
_NUMBERS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


def check_value(key: str, value: Any, kind: Any) -> None:
    """Check plain data against a type.

    Args:
        key: Their key, for the message.
        value: The data.
        kind: The type, possibly annotated with limits (:mod:`prune_lightning.ranges`).

    Raises:
        UserError: They are not of that type.
    """
    if not _fits(value, kind):
        raise UserError(f"{key} is expected to be {described(kind)}, but got {shown(value)}")


def check_values(scope: str, kind: Any, **values: Any) -> None:
    """Check several values of one type, by their keys in a scope; see :func:`check_value`."""
    for name, value in values.items():
        check_value(f"{scope}.{name}", value, kind)


def _fits(value: Any, kind: Any) -> bool:
    """Whether plain data are of a type; pydantic's strict rules for JSON, by which no text is a list or a number."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # not of JSON
        return True
    try:
        _adapter(kind).validate_json(text)
    except ValidationError:
        return False
    except (PydanticUserError, SchemaError):  # a type without values in JSON, such as a class or a function
        return not isinstance(kind, type)
    return True


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    settings = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        return TypeAdapter(kind, config=settings)
    except PydanticUserError:
        return TypeAdapter(kind)  # a type with settings of its own


def described(kind: Any) -> str:
    """Return words for a type.

    >>> described(int | None)
    'a whole number or null'
    >>> described(Sequence[str])
    'a list of texts'
    """
    return " or ".join(dict.fromkeys(_alternatives(kind)))


def _alternatives(kind: Any) -> Iterator[str]:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    base = origin or kind
    if kind is None or kind is type(None):
        yield "null"
    elif origin in (typing.Union, types.UnionType):
        for one in inside:
            yield from _alternatives(one)
    elif origin is typing.Literal:
        yield from map(str, inside)
    elif origin is typing.Annotated:
        yield " ".join([described(inside[0]), _limits(inside[1:])]).strip()
    elif base in _NAMES:
        yield _NAMES[base]
    elif base is tuple and inside and Ellipsis not in inside:
        yield f"a list of {len(inside)} {_plural(inside[0])}"
    elif isinstance(base, type) and issubclass(base, Mapping):
        yield "a mapping" + (f" to {_plural(inside[-1])}" if inside and inside[-1] is not Any else "")
    elif isinstance(base, type) and issubclass(base, (Sequence, AbstractSet)):
        yield "a list" + (f" of {_plural(inside[0])}" if inside else "")
    else:
        yield f"an entry with a _target_ ({getattr(base, '__name__', base)})"


def _plural(kind: Any) -> str:
    words = described(kind)
    for one, many in (("a whole number", "whole numbers"), ("a list", "lists"), ("a number", "numbers")):
        if words.startswith(one):
            return many + words.removeprefix(one)
    return f"{words.removeprefix('a ')}s" if words in _NAMES.values() else words


def _limits(constraints: Sequence[Any]) -> str:
    """Return words for the limits of a number, e.g. "of at least 1"."""
    found = {name: getattr(each, name) for each in constraints for name in _NUMBERS if hasattr(each, name)}
    if set(found) == {"ge", "le"}:
        return f"from {found['ge']} to {found['le']}"
    return " and ".join(f"{_NUMBERS[name]} {limit}" for name, limit in found.items())
