"""Files of other people are data: nothing in them is run, opened, or shown as markup."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

FILES = sorted([*(ROOT / "prune_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), ROOT / "train.py"])
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {("os", "system"), ("os", "popen")}


def named(node: ast.expr) -> tuple[str, ...]:
    """Return `a.b.c` as a tuple of its parts; empty for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (rest := named(node.value)):
        return (*rest, node.attr)
    return ()


def findings(source: str) -> list[str]:
    """Return what in a module could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"imports {name}" for name in modules if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = named(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
        if len(name) == 1 and name[0] in RUNS_TEXT:
            found.append(f"calls {name[0]}")
        if name[-2:] in SHELLS or given.get("shell") == "True":
            found.append("runs a shell")
        if name[-2:] == ("torch", "load") and given.get("weights_only") != "True":
            found.append("loads a pickle")
        if name[-2:] in {("np", "load"), ("numpy", "load")} and given.get("allow_pickle", "False") != "False":
            found.append("loads a pickle")
        if name[-2:] in {("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}:
            found.append("loads objects from YAML")
        if given.get("trust_remote_code", "False") == "True":
            found.append("runs code of a model's repository")
        if name[-1:] == ("Environment",) and "loader" in given and given.get("autoescape") != "True":
            found.append("renders without escaping")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_a_file_can_be_run(path):
    found = findings(path.read_text())
    if path.name == "pretrain.py":  # its card is Markdown of our own figures; nothing comes from outside
        found = [entry for entry in found if entry != "renders without escaping"]
    if path.name == "distributed.py":  # messages between the processes of one run; no file is read
        found = [entry for entry in found if "pickle" not in entry]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "jinja2.Environment(loader=loader)",
    ],
)
def test_the_scan_finds_what_it_looks_for(line):
    assert findings(line)


def test_a_path_in_a_record_is_not_opened(tmp_path):
    from prune_lightning.data.jsonl import JSONLines

    secret = tmp_path / "secret"
    secret.write_text("do not read this")
    text = f'{{"subject": "{secret}", "prompt": "{secret} holds", "target_new": "@{secret}"}}\n'
    (tmp_path / "own.jsonl").write_text(text)
    stream = JSONLines(path=str(tmp_path / "own.jsonl"))
    stream.setup()
    assert "do not read" not in str(stream.requests)
    assert stream.requests[0].target_new == f"@{secret}"
