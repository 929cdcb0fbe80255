"""The notebooks of the documentation run, and say what they said when they were committed."""

from __future__ import annotations

import os
import re

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")
Config = pytest.importorskip("traitlets.config").Config

NAMES = ("edit_a_model", "prune_in_fine_tuning")


def read(name):
    return nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)


def texts(notebook):
    """Return the text that each cell of code has put out."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
            found.append("".join(parts).strip())
    return found


def without_figures(text):
    """Return a text without its numbers and what follows from their width: the last digits depend on the processor."""
    return re.sub(r"-?\d[\d.]*(e-?\d+)?|[-━─┏┓┗┛┡┩┃│└┘┴┳╇╈]| +", "", text)


def execute(folder):
    """Execute both notebooks in one kernel, since most of their time is that of imports.

    The kernel is reached through files. Kernels that start at the same time can be given the same TCP ports.
    """
    notebooks = {name: read(name) for name in NAMES}
    config = Config({"KernelManager": {"transport": "ipc"}})
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebooks[NAMES[0]], timeout=300, kernel_name="python3", resources=resources, config=config
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for name, notebook in notebooks.items():
        client.nb = notebook
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        client.execute(env=environment, cleanup_kc=name == NAMES[-1])
    return notebooks


def test_notebooks_say_what_they_said_when_they_were_committed(tmp_path, monkeypatch):
    """One test, so that they are executed once, however the tests are distributed."""
    monkeypatch.chdir(tmp_path)  # the kernel's files are named relative to the folder of both processes
    executed = execute(tmp_path)
    for name in NAMES:
        for now, before in zip(texts(executed[name]), texts(read(name)), strict=True):
            assert without_figures(now) == without_figures(before), name
    edits_hold_and_one_is_taken_back(texts(executed["edit_a_model"]))
    prune_keeps_what_fine_tuning_alone_loses("\n".join(texts(executed["prune_in_fine_tuning"])))


def edits_hold_and_one_is_taken_back(said):
    assert said[3:5] == ["'Rome.'", "'Paris.'"]
    after_undo = next(text for text in said if text.startswith("["))
    assert after_undo == "['Paris.', 'London.']"
    assert said[-2] == "'The capital of Italy is London.'"


def prune_keeps_what_fine_tuning_alone_loses(said):
    alone, pruned, trainer = (
        tuple(map(float, pair)) for pair in re.findall(r"loss (\d+\.\d+), retention (-?\d+\.\d+)", said)
    )
    assert max(alone[0], pruned[0], trainer[0]) < 1.5, "all learn the text"
    assert pruned[1] > alone[1] + 0.2
    assert trainer[1] > alone[1] + 0.2
