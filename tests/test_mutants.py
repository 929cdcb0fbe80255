"""The list of mutants names text and tests that exist; `make mutants` puts the faults in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

MUTANTS = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_text_of_a_mutant_exists_once(mutant):
    assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1


def test_pytest_finds_the_tests_of_all_mutants():
    # Pytest itself, as a test's parameters are part of its name.
    tests = sorted({test for mutant in MUTANTS for test in mutant["tests"]})
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert collected.returncode == 0, collected.stdout[-2000:] + collected.stderr[-2000:]
