"""The wheel holds what it should, at its place, and works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_code_configuration_and_the_bundled_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "callbacks/prune.py",
        "configs/train.yaml",
        "configs/model/family/llama.yaml",
        "configs/method/base/locate_then_edit.yaml",
        "bundled/world/people.tsv",
        "bundled/model/model.safetensors",
        "bundled/model_card.md.j2",
        "report/page.html.j2",
    ):
        assert f"prune_lightning/{needed}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"prune_lightning"}
    assert not [name for name in names if name.endswith(".pyi")]


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import prune_lightning.callbacks as c; "
        "from prune_lightning.cli import main; from prune_lightning.models.family import family_names; "
        "assert 'site' in c.__file__ and 'llama' in family_names(); "
        "sys.argv[1:] = ['--cfg', 'job', 'method=memit']; main()"
    )
    command = [sys.executable, "-P", "-S", "-c", "import site; site.main(); " + code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune_lightning.methods.memit.MEMIT" in done.stdout


def test_callbacks_have_one_identity():
    code = "import prune_lightning.callbacks as a, prune_lightning.callbacks.prune as b; assert a.PRUNE is b.PRUNE"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
