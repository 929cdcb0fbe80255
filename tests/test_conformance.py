"""Every method in `configs/method` on a tiny model of every family in `configs/model/family`.

What a method computes is compared with dense references in `test_reference_editors.py`, and every restraint in
`test_restraint_conformance.py`; here is what all methods owe alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, ROOT, quiet_trainer, write
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from prune_lightning.methods.base import EditingModule
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import capture
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.types import DenseUpdate, EditBatch, EditRequest

FOLDER = ROOT / "configs" / "method"
REQUESTS = (
    EditRequest(0, "Japan", "The capital of Japan is", "Rome", "Tokyo"),
    EditRequest(1, "Claude Monet", "By profession, Claude Monet was a", "chemist", "painter"),
)
PREFIXES = ["The river. ", "Under an old bridge. "]


class SentenceCorpus:
    def texts(self):
        return [
            f"The {word} of Japan is a {other}." for word in ["old", "new", "red", "tall"] for other in ["dog", "cat"]
        ]

    def __len__(self):
        return 8

    def identity(self):
        return "eight sentences"


def read(path: Path) -> DictConfig:
    """Return a method's YAML on top of those that it names; what refers to a model takes the method's own values."""
    config = OmegaConf.load(path)
    for entry in config.pop("defaults", ["_self_"]):
        if entry != "_self_":
            if not isinstance(entry, str):  # a group, with the default choice
                ((group, choice),) = entry.items()
                entry = f"{choice}@{group.partition('@')[2]}"
            file, _, package = entry.partition("@")
            base = read(path.parent / f"{file}.yaml")
            config = OmegaConf.merge(base if package in ("", "_here_") else {package: base}, config)
    return config


KINDS = {path.stem: get_class(read(path)._target_) for path in sorted(FOLDER.glob("*.yaml"))}
METHODS = [name for name, kind in KINDS.items() if kind.in_weights]
MEMORIES = [name for name, kind in KINDS.items() if not kind.in_weights]  # see `test_memory_editors.py`


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings for a random model of three layers."""
    settings = settings | {"layers": [1]}
    if "contexts" in settings:
        settings["contexts"] = {"_target_": settings["contexts"]["_target_"], "fixed": PREFIXES}
    if "value" in settings:
        settings["value"]["steps"] = 5
    if "smallest_residual" in settings:  # and a random model fits no published one
        settings |= {"smallest_residual": 0.0, "largest_residual": None}
    if "null_threshold" in settings:  # the statistics of eight sentences leave no small eigenvalues
        settings["null_threshold"] = 1e3
    if "count" in settings:  # of MEMOIR's inputs, of 32, or of IKE's demonstrations
        settings["count"] = 8
    if "seed" in settings:
        settings["seed"] = 0
    if "steps" in settings:
        settings["steps"] = 5
    if "margins" in settings:  # in five steps the loss of the target has to fall
        settings |= {"margins": settings["margins"] | {"alpha": 1e3, "beta": 0.0, "gamma": 0.0}, "learning_rate": 0.1}
    if "guidance" in settings:  # of ELDER; the facts of a step are then trained one by one
        settings |= {"experts": 8, "batch_size": 1, "learning_rate": 0.01}
    for trained in {"hypernetwork", "path"} & settings.keys():  # there is none for a random model
        settings[trained] = None
    if settings.get("second_moments"):
        settings["second_moments"] = SecondMoments(SentenceCorpus(), ridge=1.0)
    if "editor" in settings:
        settings["editor"] = small(settings["editor"])
    return settings


def build(name: str, language_model) -> EditingModule:
    config = read(FOLDER / f"{name}.yaml")
    settings = small(OmegaConf.to_container(config, resolve=False))
    module = instantiate(settings, _convert_="all", language_model=language_model).to(language_model.device)
    module.prepare()
    return module


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("method", METHODS)
def test_method_on_family(method, family, tiny):
    language_model = tiny(family)
    module = build(method, language_model)
    rows, columns = language_model.rewrite_module(1).weight.shape
    assert rows == columns, "the test model's edited matrix has to be square"
    before = {name: p.detach().clone() for name, p in language_model.named_parameters()}

    updates, details = module.compute_update(REQUESTS)
    after = dict(language_model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before), "compute_update has to be pure"
    assert set(updates) == set(module.edited_modules()) >= {language_model.rewrite_name(1)}
    assert len(details) == len(REQUESTS)

    for name, update in updates.items():
        module.edited_matrices()[name].add(update)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert set(changed) == {f"model.{name}" for name in updates}, "only the declared matrices may change"

    module.run.restore()
    assert all(torch.equal(before[name], after[name]) for name in before), "restore has to be exact"


@pytest.mark.parametrize("method", METHODS)
def test_update_moves_the_output_on_the_prompt_as_the_method_says(method, family, tiny):
    """Orientation: on a square matrix a transposed update would fit the shape and miss the value."""
    language_model = tiny(family)
    module = build(method, language_model)
    name, request = language_model.rewrite_name(1), REQUESTS[1]
    with capture(inputs=[language_model.rewrite_module(1)]) as seen:
        language_model(
            *language_model.tokens.pad([language_model.tokens.encode(request.prompt)], language_model.device)
        )
    keys = seen.inputs[0][0]
    before = language_model.rewrite_output(1, keys)
    update = module.compute_update([request])[0][name]
    by_hand = update.dense()
    write(module, [request], {name: update})
    moved = language_model.rewrite_output(1, keys) - before
    expected = keys @ by_hand.T
    assert torch.allclose(moved, expected, rtol=1e-8, atol=1e-10)
    assert float(moved.norm()) > 1e-6
    weight = language_model.rewrite_module(1).weight.detach() - module.edited_matrices()[name]._original
    stored = weight.T if stores_transposed(language_model.rewrite_module(1)) else weight
    assert torch.allclose(stored, by_hand, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_update_is_skipped(method, tiny, monkeypatch):
    module = build(method, tiny("gpt2"))
    original = module.language_model.rewrite_module(1).weight.detach().clone()
    compute = module.compute_update

    def broken(requests):
        updates, details = compute(requests)
        return {name: DenseUpdate(update.dense() * float("nan")) for name, update in updates.items()}, details

    monkeypatch.setattr(module, "compute_update", broken)
    with pytest.warns(UserWarning, match="not finite"):
        quiet_trainer().fit(module, torch.utils.data.DataLoader([EditBatch(REQUESTS[:1])], batch_size=None))
    assert torch.equal(module.language_model.rewrite_module(1).weight, original)
    assert module.run.last_report is not None
    assert not module.run.last_report.applied
