"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml

from prune_lightning.errors import UserError

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of `edit --to`, or of a run of train.py.")]
Method = Annotated[str, typer.Option(help="Editing method: rome, memit, alphaedit, ...")]
Restraint = Annotated[str, typer.Option(help="Restraint after each edit: prune, rect, none, ...")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. method.layers=[5]; repeatable.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: an accelerator, if any.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Longest answer, in tokens.")]


def nested(settings: list[str] | None) -> dict[str, Any]:
    """Return settings such as ``method.value.steps=10`` as nested dictionaries.

    Raises:
        UserError: A setting without a value.

    >>> nested(["method.value.steps=10", "seed=1"])
    {'method': {'value': {'steps': 10}}, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for setting in settings or []:
        name, given, value = setting.partition("=")
        if not given:
            raise UserError(f"--set {setting}: expected KEY=VALUE")
        *path, last = name.split(".")
        inner = found
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = yaml.safe_load(value)
    return found
