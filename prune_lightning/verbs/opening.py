"""Opens the editor that a verb works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prune_lightning.errors import UserError

if TYPE_CHECKING:
    from prune_lightning.editor import Editor


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds edits."""
    return (Path(folder).expanduser() / "ledger" / "base.json").is_file()


def check_new(context: typer.Context, model: str) -> None:
    """Raise an error if options of a new editor are given for a folder of edits, which has its own.

    Args:
        context: The verb's call.
        model: The model, or a folder of edits.

    Raises:
        UserError: They would not be used.
    """
    names = ("method", "restraint", "batch_size", "chat_template", "settings")
    given = [name for name in names if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"]
    if given and is_run(model):
        options = ", ".join("--set" if name == "settings" else f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{model} holds edits and is continued as they were written: omit {options}")


@contextmanager
def existing(run: str | Path, device: str | None) -> Iterator[Editor]:
    """Yield an editor of a folder of edits.

    Raises:
        UserError: The folder holds none. This is said before the libraries are imported, which takes seconds.
    """
    if not is_run(run):
        raise UserError(f"{run} holds no edits; give a folder of `edit --to`, or of a run of train.py")
    from prune_lightning.editor import Editor

    with Editor.open(run, device=device) as editor:
        yield editor


@contextmanager
def opened(
    model: str,
    device: str | None,
    to: Path | None = None,
    method: str = "memit",
    restraint: str = "none",
    batch_size: int = 1,
    chat_template: bool = False,
    options: dict[str, Any] | None = None,
) -> Iterator[Editor]:
    """Yield an editor of a run, or of a model with a new folder.

    Raises:
        UserError: ``to`` is given for a run, or holds edits.
    """
    if is_run(model):
        if to is not None:
            raise UserError(f"{model} holds edits and is continued in place: omit --to")
        with existing(model, device) as editor:
            yield editor
        return
    if to is not None and is_run(to):
        raise UserError(f"{to} holds edits already: continue them by `edit {to} ...`, or give another folder")
    from prune_lightning.editor import Editor

    further: dict[str, Any] = {"batch_size": batch_size, "chat_template": chat_template, "options": options}
    with Editor(model, method, restraint, folder=to, device=device, **further) as editor:
        yield editor
