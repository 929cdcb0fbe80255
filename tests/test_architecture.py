"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

# Imports run downwards only: a package may import from those to its left.
FLOORS = [
    {"distributed", "errors"},
    {"sharding"},
    {
        "phases",
        "terminal",
        "json_files",
        "fingerprint",
        "devices",
        "usage",
        "run_lock",
        "ranges",
        "threads",
    },
    {"text", "value_types"},
    {"requests", "questions"},
    {"types", "records", "atomic_files", "costs"},
    {"spectral", "metrics"},
    {"models", "bundled"},
    {"data", "evaluation", "methods"},
    {"report", "ledger"},
    {"export"},
    {"callbacks"},
    {"tasks"},
    {"editor"},
    {"playground"},
    {"cli"},
    {"verbs"},
    {"commands"},
]
FILES = sorted([*(ROOT / "prune_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), ROOT / "train.py"])
FAMILIES = ("gpt", "llama", "mistral", "qwen", "gemma", "phi", "neox")


def floor(part: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if part in names)


def part_of(path: Path) -> str | None:
    relative = path.relative_to(ROOT).with_suffix("")
    if relative.parts[0] == "callbacks":
        return "callbacks"
    return relative.parts[1] if len(relative.parts) > 1 and relative.parts[1] != "__init__" else None


def imported(tree: ast.AST) -> list[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_house_rules(path):
    tree = ast.parse(path.read_text())
    part, modules = part_of(path), imported(tree)
    assert len(path.read_text().splitlines()) <= 300
    for module in modules:
        if part and module.startswith("prune_lightning.") and (target := module.split(".")[1]) != part:
            assert floor(target) < floor(part), f"{module} is not below {part}"
        assert module.split(".")[0] != "callbacks", "import prune_lightning.callbacks, or there are two of each class"
        assert module.split(".")[0] != "wandb", "Weights & Biases is reached through Lightning's logger"
        if part and floor(part) <= 6 and part != "metrics":
            assert module.split(".")[0] not in ("lightning", "transformers"), "the lowest floors are plain torch"
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)):
            words = [
                w.value.lower() for w in ast.walk(node.test) if isinstance(w, ast.Constant) and isinstance(w.value, str)
            ]
            assert not any(word.startswith(FAMILIES) for word in words), "a model family is data, not a branch"


def test_packages_are_listed_as_they_lie():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "prune_lightning").rglob("__init__.py")}
    assert listed == found | {"prune_lightning.callbacks", "prune_lightning.configs"}


def test_no_tracked_file_is_large_but_what_belongs_to_the_model():
    large = [
        str(path.relative_to(ROOT))
        for folder in ("prune_lightning", "callbacks", "configs", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.stat().st_size > 200_000
    ]
    assert {path.removeprefix("prune_lightning/bundled/").split("/")[0] for path in large} == {
        "mend",
        "model",
        "serac",
        "statistics",
    }


def test_readme_is_short_and_shows_a_command_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("make run") for line in lines[:25])


def _rows(table: str) -> dict[tuple[str, str], list[str]]:
    """Cells of a Markdown table by method and restraint."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) > 2}


def test_readme_shows_figures_that_make_smollm2_wrote():
    written = _rows((ROOT / "docs" / "smollm2" / "counterfact" / "compare.md").read_text())
    shown = {key: cells for key, cells in _rows((ROOT / "README.md").read_text()).items() if key in written}
    assert {("rome", "none"), ("rome", "prune")} <= shown.keys()
    for key, cells in shown.items():
        if key[0] != "method":
            assert set(cells) <= set(written[key]), key
