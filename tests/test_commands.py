"""The verbs of the command line, as a user meets them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_command_line import SLOW
from test_command_line import command as settings_command
from typer.testing import CliRunner

from prune_lightning.commands import app
from prune_lightning.errors import UserError, plain_warnings

VERBS = ("edit", "ask", "compare", "report", "undo", "export", "check", "plan", "tune", "play", "runs")
FACT = ["--subject", "France", "--prompt", "The capital of France is", "--target", "Rome"]


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_fact_goes_the_whole_way(tmp_path: Path):
    out, model = str(tmp_path / "out"), str(tmp_path / "model")
    assert "1 fact written" in run("edit", "bundled", *FACT, "--method", "rome", "--to", out)
    table = tmp_path / "facts.csv"
    table.write_text("subject,prompt,target_new\nItaly,The capital of Italy is,Paris\n")
    assert "1 fact written" in run("edit", out, str(table))
    assert run("ask", out, "The capital of France is", "The capital of Italy is").split() == ["Rome.", "Paris."]
    assert run("ask", out, "The capital of France is", "--before").split() == ["Paris."]
    assert "Rome." in run("compare", out)
    assert "efficacy, exact match" in run("report", out)
    assert "taken back: The capital of Italy is Paris" in run("undo", out)
    assert run("ask", out, "The capital of Italy is").split() == ["Rome."]
    assert "reloaded, largest logit error" in run("export", out, "--to", model)
    listed = run("runs", str(tmp_path))
    assert all(word in listed for word in ("ROME", "PRUNE", "bundled"))
    assert "retention" not in listed  # nothing was scored
    with pytest.raises(UserError, match="holds edits already"):
        run("edit", "bundled", *FACT, "--to", out)
    with pytest.raises(UserError, match="is continued as they were written: omit --method, --set"):
        run("edit", out, *FACT, "--method", "rome", "--set", "seed=1")
    with pytest.raises(UserError, match=r"no file '.*factz\.csv'; did you mean 'facts\.csv'"):
        run("edit", "a model that is not looked for", str(tmp_path / "factz.csv"))
    with pytest.raises(UserError, match="give a file of facts, or one fact"):
        run("edit", "bundled", "--to", str(tmp_path / "other"))


def test_an_edit_that_does_not_hold_is_named(tmp_path: Path):
    facts = tmp_path / "facts.csv"
    facts.write_text(
        "subject,prompt,target_new\nItaly,The capital of Italy is,Paris\nItaly,The capital of Italy is,Oslo\n"
    )
    text = run("edit", "bundled", str(facts), "--method", "rome")
    assert "✗ Paris" in text
    assert "✓ Oslo" in text
    assert "Edits that do not hold: 1 of 2." in text
    assert "do not hold" not in run("edit", "bundled", *FACT, "--method", "rome")


def test_warnings_of_the_package_are_one_plain_line(capsys):
    with warnings.catch_warnings(record=True) as others:
        plain_warnings()
        warnings.warn_explicit("a remark", UserWarning, str(ROOT / "prune_lightning" / "seed.py"), 1)
        warnings.warn_explicit("a remark", UserWarning, str(ROOT / "callbacks" / "guards.py"), 1)
        warnings.warn_explicit("another", UserWarning, "elsewhere.py", 1)
    assert capsys.readouterr().err == "warning: a remark\n" * 2
    assert [str(other.message) for other in others] == ["another"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_fits_a_screen(verb):
    text = run(verb, "--help")
    assert f"prune-lightning {verb}" in text
    assert len(text.splitlines()) <= 45


def test_help_names_every_verb():
    text = run("--help")
    assert all(f"  {verb} " in text for verb in VERBS)
    assert not any(line.endswith("...") for line in text.splitlines() if line.startswith("  "))


PROBE = f"""
import atexit, sys
slow = {(*SLOW, "gradio", "hydra")}
atexit.register(lambda: print("IMPORTED", *(name for name in slow if name in sys.modules), file=sys.stderr))
from prune_lightning.commands import main
main()
"""


@pytest.mark.parametrize(
    ("words", "variables", "code", "expected"),
    [
        (["--help"], {}, 0, "edit"),
        (["--version"], {}, 0, "prune-lightning "),
        (["tune", "--help"], {}, 0, "prune-lightning tune"),
        (["edti"], {}, 2, "No such command 'edti'"),
        (["ask", "--befor"], {}, 2, "--before"),
        (["undo", "nowhere"], {}, 2, "nowhere holds no edits"),
        (
            [],
            {"_PRUNE_LIGHTNING_COMPLETE": "complete_bash", "COMP_WORDS": "prune-lightning ed", "COMP_CWORD": "1"},
            0,
            "edit",
        ),
    ],
)
def test_help_completion_and_a_typo_answer_at_once(words, variables, code, expected):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", PROBE, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code
    assert expected in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED"  # none of the libraries that take seconds


@pytest.mark.parametrize("words", [["check", "facts.csv"], ["tune", "bundled", "facts.csv"]])
def test_a_csv_file_is_refused_where_only_edit_reads_it(words):
    with pytest.raises(UserError, match=r"facts.csv is a CSV file, which only `edit` reads"):
        run(*words)


def test_tune_finds_values_that_edit_takes(tmp_path: Path, monkeypatch):
    pytest.importorskip("optuna")
    names = ["France", "Italy", "Spain", "Norway"]
    facts = [f'{{"subject": "{name}", "prompt": "The capital of {name} is", "target_new": "Rome"}}' for name in names]
    (tmp_path / "facts, new.jsonl").write_text("\n".join(facts))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "it's tuned"
    words = ["tune", "bundled", "facts, new.jsonl", "--method", "ft_m", "--restraint", "none", "--edits", "5"]
    small = [word for setting in ("pilots=2", "held_out=2", "rungs=1") for word in ("--set", f"tune.{setting}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", "from prune_lightning.commands import main; main()"]
    subprocess.run([*code, *words, *small, "--to", out], env=environment, check=True, capture_output=True)
    found = yaml.safe_load((out / "hparams.yaml").read_text())
    assert (found["found"]["method"], found["found"]["pilot_edits"] >= 5) == ("ft_m", True)
    text = run(
        "edit", "bundled", *FACT, "--method", "ft_m", "--restraint", "none", "--set", f"hparams={out}/hparams.yaml"
    )
    assert "1 fact written" in text
    assert "Nothing was kept" in text


def test_settings_are_those_of_train_py():
    assert settings_command("--help").returncode == 0
