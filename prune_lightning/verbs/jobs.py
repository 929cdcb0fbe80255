"""Verbs that are jobs of ``train.py``: they write its settings and run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prune_lightning.errors import UserError
from prune_lightning.verbs.options import Method, Restraint, Settings


def check(
    facts: Annotated[Path, typer.Argument(metavar="FACTS", help="A JSONL or JSON file.")],
    model: Annotated[str, typer.Option(help="The model whose tokenizer and context length are used.")] = "bundled",
    settings: Settings = None,
) -> None:
    """List what is wrong with a file of facts."""
    run_train(["experiment=check", *_data(facts), *_model(model), *(settings or [])])


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder, GGUF, or preset.")],
    method: Method = "memit",
    restraint: Restraint = "prune",
    settings: Settings = None,
) -> None:
    """Estimate memory and time of edits."""
    words = [f"method={method}", f"restraint={restraint}", *_model(model), *(settings or [])]
    run_train(["experiment=plan", *words])


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder, GGUF, or preset.")],
    facts: Annotated[Path | None, typer.Argument(metavar="FACTS", help="Pilot edits: a JSONL or JSON file.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder for the result; a new one in runs/ by default.")] = None,
    method: Method = "memit",
    restraint: Restraint = "prune",
    edits: Annotated[int | None, typer.Option(help="Maximum of pilot edits over all trials; 800 by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit in minutes; 60 by default.")] = None,
    settings: Settings = None,
) -> None:
    """Find hyper-parameters for a model on pilot edits."""
    words = [f"method={method}", f"restraint={restraint}", *_model(model)]
    words += [] if facts is None else [*_data(facts), "tune.skip=0"]
    words += [] if to is None else [setting("hydra.run.dir", to)]
    words += [] if edits is None else [f"tune.max_edits={edits}"]
    words += [] if minutes is None else [f"tune.max_minutes={minutes}"]
    run_train(["experiment=tune", *words, *(settings or [])])


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds the runs.")] = Path("runs"),
) -> None:
    """List runs with their headline figures."""
    from rich.console import Console

    from prune_lightning.report.listing import run_table
    from prune_lightning.tasks.choices import model_name

    table, console = run_table(folder, model_name), Console()
    if not console.is_terminal:  # a line per run, for grep
        unlimited = console.options.update(max_width=1_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


def settings(context: typer.Context) -> None:
    """Run train.py with KEY=VALUE settings."""
    run_train(context.args)


def setting(key: str, value: object) -> str:
    r"""Return a setting with any text as its value.

    >>> print(setting("data.path", "it's, (new).jsonl"))
    data.path='it\'s, (new).jsonl'
    """
    escaped = str(value).replace("'", r"\'")
    return f"{key}='{escaped}'"


def run_train(words: list[str]) -> None:
    """Run ``train.py`` with these settings."""
    from prune_lightning import cli

    sys.argv[1:] = words
    cli.main()


def _data(facts: Path) -> list[str]:
    if facts.suffix.lower() == ".csv":
        raise UserError(f"{facts} is a CSV file, which only `edit` reads; it checks the facts before it writes any")
    return ["data=jsonl", setting("data.path", facts)]


def _model(name: str) -> list[str]:
    from prune_lightning.tasks.choices import preset_for

    option, located = preset_for(name)
    return [f"model={option}", *(setting(f"model.{key}", value) for key, value in located.items())]
