"""What a user is told on the command line: errors and warnings as one clear line, without the place in the code."""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """An error in the configuration or the data; the message says what to change."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on; each once, since they may refer to each other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a :class:`UserError` if ``value``, given for the option ``name``, is not one of the choices."""
    if value not in set(choices):
        raise UserError(f"unknown {name} {value!r}: {near(str(value), choices)}")


def shown(value: object, limit: int = 80) -> str:
    """Return a value for a message: on one line, with the middle of a long value left out.

    >>> shown("a" * 100, 20)
    "'aaaaaaa ... aaaaaa'"
    >>> shown(None)
    'null'
    """
    text = "null" if value is None else repr(value)
    if len(text) <= limit:
        return text
    kept = limit - 5
    return f"{text[: kept - kept // 2]} ... {text[len(text) - kept // 2 :]}"


def kind_of(value: object) -> str:
    """Return what a value is, for a message about one of the wrong kind.

    >>> kind_of(UserError)
    'the class UserError'
    >>> kind_of(UserError("a"))
    'an instance of UserError'
    >>> kind_of("a")
    "'a'"
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = value is None or isinstance(value, (str, int, float, list, tuple))
    return shown(value) if plain else f"an instance of {type(value).__name__}"


def near(name: str, options: Iterable[str], count: int = 3) -> str:
    """Return a clause that names the closest of ``options``, or all of them if none is close.

    >>> near("memmit", ["rome", "memit"])
    "did you mean 'memit'?"
    >>> near("ROME", ["rome", "memit"])
    "did you mean 'rome'?"
    >>> near("xyz", ["rome", "memit"])
    "choose from 'memit', 'rome'"
    """
    choices = sorted(set(options))
    by_lower = {choice.lower(): choice for choice in choices}
    found = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)]
    if found:
        return "did you mean " + " or ".join(f"'{match}'" for match in found) + "?"
    return "choose from " + ", ".join(f"'{choice}'" for choice in choices[:30]) + (", ..." if len(choices) > 30 else "")


def near_path(path: Path, folders: bool = False) -> str:
    """Return a clause that names what lies beside a missing file and has a similar name.

    Args:
        path: The missing file or folder.
        folders: Whether only folders count.
    """
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r} either"
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or not folders]
    close = difflib.get_close_matches(path.name, siblings)
    return near(path.name, close) if close else f"nothing in {str(path.parent)!r} has a name like it"


def plain_warnings() -> None:
    """Print this package's warnings as one line from now on; for the entry points of the command line."""
    package = Path(__file__).parent
    show, own = warnings.showwarning, tuple(f"{folder}{os.sep}" for folder in (package, package.parent / "callbacks"))

    def shown_plainly(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if filename.startswith(own):
            sys.stderr.write(f"warning: {message}\n")
        else:
            show(message, category, filename, *rest, **more)

    warnings.showwarning = shown_plainly
