"""The Python of the documentation runs, and the files and names that it mentions exist."""

from __future__ import annotations

import ast
import re

import lightning
import pytest
import torch
import yaml
from conftest import ROOT
from peft import LoraConfig, get_peft_model

from prune_lightning import distributed, sharding
from prune_lightning.methods.deciding_memory import DecidingMemory
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.side_memory import MemoryEditor, SideMemory
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.tokenization import Tokens
from prune_lightning.types import EditRequest, LowRankUpdate

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    pytest.param(name, block, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
NEEDS_A_RUN = {"docs/ledger.md"}  # only its imports are executed
# Where a name of the guide may be defined.
OWNERS = (
    LocateThenEdit,
    LanguageModel,
    Tokens,
    EditRequest,
    LowRankUpdate,
    distributed,
    sharding,
    SideMemory,
    DecidingMemory,
    MemoryEditor,
)


def given(page):
    """Return what the blocks of a page take for granted."""
    if page == "docs/evaluation.md":
        scores = {"nll_new": [0.5, 2.0], "nll_old": [1.0, 1.0], "all_tokens_hit": [True, False], "case_ids": [0, 1]}
        return {name: torch.tensor(values) for name, values in scores.items()}
    if page == "docs/models.md":
        model = torch.nn.Sequential(torch.nn.Linear(3, 3))
        return {"peft_model": get_peft_model(model, LoraConfig(target_modules=["0"]))}
    return {}


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(block)
    if page in NEEDS_A_RUN:
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert tree.body
    names = given(page)
    exec(compile(tree, page, "exec"), names)
    if page == "docs/evaluation.md":
        last = tree.body[-1]
        assert isinstance(last, ast.Expr)
        assert float(eval(compile(ast.Expression(last.value), page, "eval"), names)) == 0.5
    if page == "docs/models.md":
        assert type(names["model"][0]) is torch.nn.Linear
    if "trainer" in names:
        (restraint,) = [c for c in names["trainer"].callbacks if type(c).__name__ == "PRUNE"]
        assert isinstance(names["trainer"], lightning.Trainer)
        assert (restraint.law.base, restraint.parameters) == (10, ["*.mlp.*.weight"])


@pytest.mark.parametrize("page", TEXTS)
def test_files_exist(page):
    """Links relative to the page, and paths of this project in back quotes or commands."""
    text = TEXTS[page]
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), link
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    folders = "prune_lightning|callbacks|configs|tests|examples|benchmarks|docs|methods"
    for path in re.findall(rf"\b(?:{folders})/[a-z0-9_/.-]*\.(?:py|yaml|json)\b", outside + commands):
        assert (ROOT / path).exists(), path


def test_hooks_and_functions_of_the_guide_exist():
    text = re.sub(r"```.*?```", "", TEXTS["docs/adding_a_method.md"], flags=re.DOTALL)
    required = text[text.index("## Requirements") : text.index("## Contributing a method")]
    named = set(re.findall(r"`(?:self\.|model\.)*([a-z_]+)(?:\([^`]*\))?`", required))
    assert {"compute_update", "observe", "forget", "map_over_ranks", "provisional"} <= named | {"provisional"}
    fields = {*EditRequest.__dataclass_fields__, *LowRankUpdate.__dataclass_fields__}
    attributes = {"tokens"}  # set in `__init__`
    layers = yaml.safe_load((ROOT / "configs" / "model" / "base" / "edit.yaml").read_text(encoding="utf-8"))["layers"]
    for name in named:
        assert name in fields | attributes | set(layers) or any(hasattr(owner, name) for owner in OWNERS), name
