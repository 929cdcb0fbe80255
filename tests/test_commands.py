"""The verbs of the command line, as a user meets them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_command_line import command as settings_command
from typer.testing import CliRunner

from prune_lightning.commands import app
from prune_lightning.errors import UserError

VERBS = ("edit", "ask", "compare", "report", "undo", "export", "check", "plan", "runs")
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
    assert "ROME" in run("runs", str(tmp_path))
    with pytest.raises(UserError, match="holds edits already"):
        run("edit", "bundled", *FACT, "--to", out)
    with pytest.raises(UserError, match="give a file of facts, or one fact"):
        run("edit", "bundled", "--to", str(tmp_path / "other"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_fits_a_screen(verb):
    text = run(verb, "--help")
    assert f"prune-lightning {verb}" in text
    assert len(text.splitlines()) <= 45


def test_help_names_every_verb_at_once():
    start = time.process_time()
    text = run("--help")
    assert all(f"  {verb} " in text for verb in VERBS)
    assert time.process_time() - start < 5  # with no import of torch
    assert not any(line.endswith("...") for line in text.splitlines() if line.startswith("  "))


def test_settings_are_those_of_train_py():
    assert settings_command("--help").returncode == 0
