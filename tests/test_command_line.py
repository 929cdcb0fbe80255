"""The command line as a user meets it: what it answers, how fast, and what it says of a mistake."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from prune_lightning import __version__, cli, commands
from prune_lightning.errors import causes, near_path

SLOW = ("torch", "lightning", "transformers", "torchmetrics", "wandb", "matplotlib")
# Runs the command line and says at exit what it has imported.
PROBE = f"""
import atexit, sys
atexit.register(lambda: print("IMPORTED", *(name for name in {SLOW} if name in sys.modules), file=sys.stderr))
from prune_lightning.cli import main
main()
"""


def command(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    words = [sys.executable, "-c", PROBE, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def answered(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of stderr, after a look at what was imported."""
    *lines, imported = done.stderr.splitlines()
    assert imported.split() == ["IMPORTED"], f"slow imports: {imported}"
    return lines


def test_version_is_that_of_the_package():
    done = command("--version")
    assert (done.returncode, done.stdout, answered(done)) == (0, f"prune-lightning {__version__}\n", [])


@pytest.mark.parametrize("main", [cli.main, commands.main])
@pytest.mark.parametrize(("given", "policy"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_sleep_unless_the_environment_says_otherwise(main, given, policy, monkeypatch, capsys):
    """Torch reads the variable when it is imported, which other tests show to be later."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["prune-lightning", "--version"])
    with contextlib.suppress(SystemExit):
        main()
    assert capsys.readouterr().out == f"prune-lightning {__version__}\n"
    assert os.environ["OMP_WAIT_POLICY"] == policy


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_screen_and_names_every_option(flag):
    done = command("method=memit", flag)
    assert (done.returncode, answered(done)) == (0, [])
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for group in ("method", "model", "data", "restraint", "evaluation", "callbacks", "trainer", "logger", "experiment"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{group} "))
        rest = [line for line in lines[start + 1 :] if line.startswith(" " * 11)]
        words = " ".join([lines[start], *rest]).split()
        assert {file.stem for file in (ROOT / "configs" / group).glob("*.yaml")} <= set(words)


def test_examples_of_the_help_compose():
    shown = [line.split("  ")[1] for line in command("--help").stdout.splitlines() if line.startswith("  prune-l")]
    examples = [line.split()[1:] for line in shown]
    assert len(examples) == 3
    for words in examples:
        if words and words[0].startswith("resume="):  # there is no such run
            continue
        words = [word.split(",")[0] for word in words if word != "-m"]
        done = command(*words, "--cfg", "job")
        assert (done.returncode, answered(done)) == (0, []), words
        config = yaml.safe_load(done.stdout)
        for word in words:
            key, value = word.split("=")
            if key in ("seed", "data.num_edits", "data.path"):
                *scopes, last = key.split(".")
                assert str((config[scopes[0]] if scopes else config)[last]) == value


def test_hydras_own_help_remains():
    done = command("--hydra-help")
    assert (done.returncode, answered(done)) == (0, [])
    assert "--cfg" in done.stdout


def test_tab_completes():
    done = command("-sc", "query=bash", COMP_LINE="train.py method=mem", COMP_POINT="19")
    assert (done.returncode, answered(done), done.stdout.split()) == (0, [], ["method=memit", "method=memoir"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["metod=memit"], "unknown key 'metod': did you mean 'method' or 'model'?"),
        (["method=memmit"], "unknown option method=memmit: did you mean 'memit' or 'emmet' or 'memoir'?"),
        (["data=jsonl"], "these settings need a value: data.path=..."),
        (["seed=a"], "seed is expected to be a whole number from 0 to 4294967295, but got 'a'"),
        (["seed=-1"], "seed is expected to be a whole number from 0 to 4294967295, but got -1"),
        (["seed=1.5"], "seed is expected to be a whole number from 0 to 4294967295, but got 1.5"),
        (["seed=true"], "seed is expected to be a whole number from 0 to 4294967295, but got True"),
        (["ledger=maybe"], "ledger is expected to be true or false, but got 'maybe'"),
        (["control=null"], "control is expected to be true or false, but got null"),
        (["snapshot_every=0"], "snapshot_every is expected to be a whole number of at least 1 or null, but got 0"),
        (["non_finite=maybe"], "non_finite is expected to be skip or raise, but got 'maybe'"),
        (["export=5"], "export is expected to be a text or a list of texts or null, but got 5"),
    ],
)
def test_mistakes_are_one_line_at_once(tmp_path, arguments, line):
    done = command(f"hydra.run.dir={tmp_path}/run", *arguments)
    assert (done.returncode, answered(done), done.stdout) == (2, [f"error: {line}"], "")
    if (tmp_path / "run").exists():
        assert (tmp_path / "run" / "error.txt").read_text() == f"{line}\n"


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path):
    done = command(f"hydra.run.dir={tmp_path}/run", "trainer=gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("IMPORTED")] == [
        f"error: trainer: PyTorch {torch.__version__} finds no GPU; choose trainer=cpu, or install a build of PyTorch "
        "for this machine's GPU"
    ]


def test_a_missing_file_names_only_names_that_are_near(tmp_path):
    for name in ("facts.jsonl", "bin", "boot", "dev"):
        (tmp_path / name).touch()
    assert near_path(tmp_path / "fact.jsonl") == "did you mean 'facts.jsonl'?"
    assert near_path(tmp_path / "nope.jsonl.gz.old") == f"nothing in {str(tmp_path)!r} has a name like it"
    assert near_path(tmp_path / "facts.json", folders=True) == f"nothing in {str(tmp_path)!r} has a name like it"
    assert near_path(tmp_path / "x" / "facts") == f"there is no folder {str(tmp_path / 'x')!r} either"


def test_causes_of_an_error_end_where_they_refer_to_each_other():
    one, other = ValueError("one"), TypeError("other")
    one.__cause__, other.__context__ = other, one
    assert list(causes(one)) == [one, other]
