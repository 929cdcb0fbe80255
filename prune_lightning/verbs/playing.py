"""The verb that opens the playground."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prune_lightning.errors import UserError
from prune_lightning.verbs.opening import check_new, existing, is_run, opened
from prune_lightning.verbs.options import Device, Method, Restraint, Settings, nested

if TYPE_CHECKING:
    from prune_lightning.editor import Editor


def play(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[RUN|MODEL]", help="A folder of edits, or a model.")] = "bundled",
    to: Annotated[Path | None, typer.Option(help="Folder that keeps the edits; by default nothing is kept.")] = None,
    method: Method = "rome",
    restraint: Restraint = "prune",
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Prompts are user turns.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; the first free one from 7860 by default.")] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
    settings: Settings = None,
    device: Device = None,
) -> None:
    """Edit a model in the browser. A RUN stays as it is."""
    from prune_lightning.playground.serving import LOOPBACK, check_gradio, served

    check_gradio()
    check_new(context, model)
    with _editor(model, to, method, restraint, chat_template, settings, device) as editor:
        with served(editor, to is not None, host, port, browser) as address:
            typer.echo(f"The playground is at {address} (Ctrl+C ends it).")
            if host not in (LOOPBACK, "localhost", "::1"):
                typer.echo("Whoever can reach this machine can edit the model there.")
            _wait()
        if to is not None and len(editor):
            typer.echo(f"The edits are in {to}: prune-lightning ask {to} PROMPT")


def _wait() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo()


@contextmanager
def _editor(
    model: str,
    to: Path | None,
    method: str,
    restraint: str,
    chat_template: bool,
    settings: list[str] | None,
    device: str | None,
) -> Iterator[Editor]:
    """Yield an editor of a model, or of a copy of a run."""
    if not is_run(model):
        with opened(model, device, to, method, restraint, 1, chat_template, nested(settings)) as editor:
            yield editor
        return
    if to is not None and to.exists():
        raise UserError(f"{to} exists: give another folder for the copy of {model}")
    with tempfile.TemporaryDirectory(prefix="prune-lightning-") as temporary:
        copy = to or Path(temporary, "run")
        shutil.copytree(Path(model).expanduser() / "ledger", copy / "ledger")
        with existing(copy, device) as editor:
            yield editor
