"""The command `prune-lightning`: verbs for editing a model; settings as `KEY=VALUE` run `train.py`.

Nothing here imports torch, which takes seconds, before a verb needs it: `--help` and a typo answer at once.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prune_lightning import __version__
from prune_lightning.errors import UserError, plain_warnings
from prune_lightning.threads import let_waiting_threads_sleep
from prune_lightning.verbs import jobs, playing
from prune_lightning.verbs.opening import check_new, existing, is_run, opened
from prune_lightning.verbs.options import Device, Method, Restraint, Run, Settings, Tokens, nested

_EPILOG = (
    "Experiments: prune-lightning KEY=VALUE ... is train.py with these settings, e.g. prune-lightning method=memit "
    "data.num_edits=200; prune-lightning settings --help lists them."
)
_SHOWN = 10  # edits whose answers are printed
app = typer.Typer(
    name="prune-lightning",
    help="Edit facts in a language model, ask it, and take edits back.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"prune-lightning {__version__}")
        raise typer.Exit


@app.command(epilog="prune-lightning edit bundled facts.jsonl --to out")
def edit(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub name, folder, GGUF, preset; or a RUN to continue.")
    ],
    facts: Annotated[Path | None, typer.Argument(metavar="FACTS", help="A JSONL, JSON or CSV file.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder for the edits. A RUN is continued in place.")] = None,
    subject: Annotated[str | None, typer.Option(help="Subject of a single fact.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of that fact; contains the subject.")] = None,
    target: Annotated[str | None, typer.Option(help="New answer of that fact.")] = None,
    method: Method = "memit",
    restraint: Restraint = "prune",
    batch_size: Annotated[int, typer.Option(help="Facts that are written together.")] = 1,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Prompts are user turns.")] = False,
    settings: Settings = None,
    device: Device = None,
) -> None:
    """Write facts into a model and keep them in a folder."""
    from prune_lightning.editor.facts import requests_of

    given = _facts(facts, {"subject": subject, "prompt": prompt, "target_new": target})
    requests = requests_of(given)  # what is wrong with them is said before the model is loaded
    check_new(context, model)
    kept = shlex.quote(str(to or model)) if to or is_run(model) else None
    with opened(model, device, to, method, restraint, batch_size, chat_template, nested(settings)) as editor:
        earlier = len(editor)
        try:
            typer.echo(repr(editor.edit(given)))
        except KeyboardInterrupt:
            where = f" after {len(editor) - earlier} of {len(requests)} facts, which are in {kept}" if kept else ""
            typer.echo(f"interrupted{where}", err=True)
            raise typer.Exit(130) from None
        numbers = range(earlier + 1, len(editor) + 1)
        typer.echo(str(editor.compare(edits=numbers[:_SHOWN])))
        if lost := editor.holds(numbers).count(False):
            typer.echo(f"Edits that do not hold: {lost} of {len(numbers)}. Try another --method, or the verb `tune`.")
        if kept:
            typer.echo(f"The edits are in {kept}: prune-lightning ask {kept} PROMPT")
        else:
            typer.echo("Nothing was kept: --to FOLDER keeps the edits.")


@app.command(epilog='prune-lightning ask out "The capital of France is"')
def ask(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of an edited model, or a model.")],
    prompts: Annotated[list[str], typer.Argument(help="One prompt or several.")],
    before: Annotated[bool, typer.Option("--before", help="Ask the unedited model.")] = False,
    tokens: Tokens = 20,
    device: Device = None,
) -> None:
    """Print the model's answer to each prompt."""
    with opened(run, device) as editor:
        for answer in editor.ask(prompts, tokens, before):
            typer.echo(answer)


@app.command(epilog='prune-lightning compare out "The capital of France is"')
def compare(
    run: Run,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; by default those of the edits.")] = None,
    tokens: Tokens = 20,
    device: Device = None,
) -> None:
    """Print the answers before and after the edits."""
    with existing(run, device) as editor:
        typer.echo(str(editor.compare(prompts or None, tokens)))


@app.command(epilog="prune-lightning report out        or: prune-lightning report runs/NAME --all")
def report(
    run: Run,
    every: Annotated[bool, typer.Option("--all", help="Every score, not only the main ones.")] = False,
    device: Device = None,
) -> None:
    """Score the edits; the scores of a finished run are read."""
    from prune_lightning.report.printed import finished_summary, print_result

    if summary := finished_summary(Path(run).expanduser()):
        from rich.console import Console

        print_result(summary, Console(), every)
        return
    with existing(run, device) as editor:
        scores = editor.report()
        typer.echo(str(scores.all() if every else scores))


@app.command(epilog="prune-lightning undo out 1        or: prune-lightning undo out --edit 3")
def undo(
    run: Run,
    count: Annotated[int, typer.Argument(help="How many of the last edits to take back.")] = 1,
    edits: Annotated[list[int] | None, typer.Option("--edit", help="Number of an edit instead; repeatable.")] = None,
    device: Device = None,
) -> None:
    """Take edits back, as if they had never been written."""
    with existing(run, device) as editor:
        for request in editor.undo(count, edits=edits or ()):
            typer.echo(f"taken back: {request.prompt} {request.target_new}")
        typer.echo(f"edits left: {len(editor)}")


@app.command(epilog="prune-lightning export out --format full --to model")
def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[str, typer.Option(help="full, lora, delta, ...; see docs/export.md.")] = "full",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Merge WISE's memory into the weights.")] = False,
    device: Device = None,
) -> None:
    """Write the edited model for other programs."""
    with existing(run, device) as editor:
        typer.echo(editor.export(format, to, overwrite, merged).line())


app.command(epilog="prune-lightning check facts.jsonl --model bundled")(jobs.check)
app.command(epilog="prune-lightning plan gpt2-xl --method memit")(jobs.plan)
app.command(epilog="prune-lightning tune bundled --method rome --edits 200 --to tuned")(jobs.tune)
app.command(epilog="prune-lightning play        or: prune-lightning play out --port 8000")(playing.play)
app.command(epilog="prune-lightning runs runs")(jobs.runs)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    jobs.settings
)


def _facts(file: Path | None, one: dict[str, str | None]) -> Any:
    given = {key: value for key, value in one.items() if value is not None}
    if file is not None and not given:
        return file
    if file is None and len(given) == len(one):
        return given
    raise UserError("give a file of facts, or one fact by --subject, --prompt and --target")


def main() -> None:
    """Run a verb, or the settings; exit with 2 and one line on an error that the user can fix."""
    let_waiting_threads_sleep()
    first = next(iter(sys.argv[1:]), "")
    if "=" in first or first in ("-m", "--multirun", "--cfg", "--hydra-help", "-sc", "--shell-completion"):
        jobs.run_train(sys.argv[1:])
        return
    plain_warnings()
    try:
        app(prog_name="prune-lightning")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
