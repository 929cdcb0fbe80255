"""The notebooks of the documentation run, and say what they said when they were committed."""

from __future__ import annotations

import os
import re

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Both in one kernel, since most of their time is that of imports."""
    notebooks = {name: read(name) for name in NAMES}
    folder = tmp_path_factory.mktemp("notebooks")
    client = nbclient.NotebookClient(
        notebooks[NAMES[0]], timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for name, notebook in notebooks.items():
        client.nb = notebook
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        client.execute(env=environment, cleanup_kc=name == NAMES[-1])
    return notebooks


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_those_that_were_committed(executed, name):
    for now, before in zip(texts(executed[name]), texts(read(name)), strict=True):
        assert without_figures(now) == without_figures(before)


def test_the_edits_hold_and_one_is_taken_back(executed):
    said = texts(executed["edit_a_model"])
    assert said[3:5] == ["'Rome.'", "'Paris.'"]
    after_undo = next(text for text in said if text.startswith("["))
    assert after_undo == "['Paris.', 'London.']"
    assert said[-2] == "'The capital of Italy is London.'"


def test_prune_keeps_what_fine_tuning_alone_loses(executed):
    said = "\n".join(texts(executed["prune_in_fine_tuning"]))
    alone, pruned, trainer = (
        tuple(map(float, pair)) for pair in re.findall(r"loss (\d+\.\d+), retention (-?\d+\.\d+)", said)
    )
    assert max(alone[0], pruned[0], trainer[0]) < 1.5, "all learn the text"
    assert pruned[1] > alone[1] + 0.2
    assert trainer[1] > alone[1] + 0.2
