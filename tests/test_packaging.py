"""The wheel holds what it should, at its place, and works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
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
        "playground/parts.html.j2",
        "playground/page.css",
        "verbs/playing.py",
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


def test_every_file_of_data_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package: ROOT / package.replace(".", "/") for package in settings["packages"]}
    folders |= {package: ROOT / folder for package, folder in settings["package-dir"].items()}
    listed = {
        file
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for file in folders[package].glob(pattern)
        if file.is_file()
    }
    present = {
        file
        for folder in ("prune_lightning", "configs", "callbacks")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyi", ".pyc")
    }
    assert present == {file for file in listed if file.suffix not in (".py", ".pyi", ".pyc")}
    assert len(present) > 100


def test_callbacks_have_one_identity():
    code = "import prune_lightning.callbacks as a, prune_lightning.callbacks.prune as b; assert a.PRUNE is b.PRUNE"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
