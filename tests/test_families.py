"""Families beside those on which everything is tested: one test each that values are right and fast equals plain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, alike, build_tiny
from test_conformance import REQUESTS, build
from transformers import AutoConfig, AutoModelForCausalLM

from prune_lightning.errors import UserError
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.export.exporting import export
from prune_lightning.export.sources import ExportSource, Provenance
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.family import ModelFamily, family_names, stores_transposed
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model

FURTHER = sorted(set(family_names()) - set(FAMILIES))
REQUEST = REQUESTS[:1]
# BLOOM and MPT compute their softmax in fp32 whatever the model's dtype, the Gemmas and others their norms.
ROUNDING = 1e-5


def plain(method: str, model: LanguageModel):
    """Return the method with its fast path switched off."""
    module = build(method, model)
    if hasattr(module, "value"):
        module.value = replace(module.value, fast=False)
    else:
        module.fast = False
    return module


def watched(model: LanguageModel, path: str, prompt: str) -> torch.Tensor:
    """Return what a module puts out at the end of a prompt, read by nothing but PyTorch and transformers."""
    seen = []

    def look(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.model.get_submodule(path).register_forward_hook(look)
    with torch.no_grad():
        model.model(input_ids=torch.tensor([model.tokens.encode(prompt)]), use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[-1]


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft", "lora"])
@pytest.mark.parametrize("family", FURTHER)
def test_fast_equals_plain(family, method, recwarn):
    model = build_tiny(family)
    fast, slow = (make(method, model).compute_update(REQUEST)[0] for make in (build, plain))
    assert not [w for w in recwarn if "fast path" in str(w.message)]
    for name, update in slow.items():
        expected = update.dense()
        assert expected.norm() > 0
        assert (fast[name].dense() - expected).norm() <= ROUNDING * expected.norm()


@pytest.mark.parametrize("family", FURTHER)
def test_rome_writes_its_value(family, tmp_path):
    """What the down-projection puts out at the subject is the value afterwards; and the model scores and exports."""
    model = build_tiny(family)
    module = build("rome", model)
    prompt = REQUEST[0].prompt[: REQUEST[0].prompt.index("Japan") + len("Japan")]
    path = model.family.rewrite.format(1)
    before = watched(model, path, prompt)
    values = module.optimise(REQUEST, ShiftSite(1, "mlp"))
    assert torch.allclose(values.reference[0], before, atol=ROUNDING * float(before.norm()))
    updates, _ = module.compute_update(REQUEST)
    for name, update in updates.items():
        module.edited_matrices()[name].add(update)
    after = watched(model, path, prompt)
    assert (after - values.target[0]).norm() <= ROUNDING * (values.target[0] - before).norm()

    pair = model.tokens.encode_pair(REQUEST[0].prompt, REQUEST[0].target_new)
    with torch.no_grad():
        log_p = model.model(input_ids=torch.tensor([pair.ids])).logits[0].log_softmax(-1)
    expected = -sum(log_p[i - 1, pair.ids[i]] for i in range(pair.target_start, len(pair.ids)))
    scores = score_pairs(model, [(REQUEST[0].prompt, REQUEST[0].target_new)])
    tokens = len(pair.ids) - pair.target_start
    assert float(scores.nll[0]) * tokens == pytest.approx(float(expected), rel=ROUNDING)

    report = export(ExportSource.from_module(module, Provenance("base")), tmp_path / "full", "full")
    ids = torch.tensor([pair.ids])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=model.model.dtype)
    with torch.no_grad():
        ours, theirs = loaded(input_ids=ids).logits, model.model(input_ids=ids).logits
    assert alike(ours, theirs), report
    assert load_language_model(str(tmp_path / "full"), "float64").family == model.family


@pytest.mark.parametrize("family", ["granite", "llama", "opt"])
def test_memit_without_ridge_writes_its_value(family):
    """A factor between the MLP and the residual stream has to be divided out, or the block falls short of the value."""
    model = build_tiny(family)
    module = build("memit", model)
    module.prefixes, module.ridge = ("",), 1e-9
    values = module.optimise(REQUEST, ShiftSite(1, "block"))
    updates, _ = module.compute_update(REQUEST)
    for name, update in updates.items():
        module.edited_matrices()[name].add(update)
    prompt = REQUEST[0].prompt[: REQUEST[0].prompt.index("Japan") + len("Japan")]
    after = watched(model, model.family.block.format(1), prompt)
    assert (after - values.target[0]).norm() <= 1e-4 * (values.target[0] - values.reference[0]).norm()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", ["rome", "ft", "lora", "kn"])
def test_a_fast_path_that_fails_gives_way_with_one_warning(family, method, monkeypatch, recwarn):
    module = build(method, build_tiny(family))
    expected, _ = module.compute_update(REQUESTS)
    failing = build(method, build_tiny(family))
    recwarn.clear()

    def broken(self, hidden, rows, offsets):
        raise TypeError("forward() takes no\nposition_ids")

    monkeypatch.setattr(CachedForward, "logits_at", broken)
    updates, _ = failing.compute_update(REQUESTS)
    failing.compute_update(REQUESTS)
    (warning,) = [str(w.message) for w in recwarn if "fast path" in str(w.message)]
    assert "TypeError: forward() takes no" in warning
    for name, update in updates.items():
        assert torch.allclose(update.dense(), expected[name].dense(), atol=1e-7)


def test_lack_of_memory_is_not_taken_for_a_misfit(monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(CachedForward, "logits_at", full)
    with pytest.raises(torch.OutOfMemoryError):
        build("ft", build_tiny("llama")).compute_update(REQUEST)


@pytest.mark.parametrize(("family", "change"), [("granite", {"multiplier": None}), ("gemma2", {"after_mlp": None})])
def test_a_yaml_that_leaves_something_out_costs_speed_and_not_the_value(family, change, recwarn):
    whole = build_tiny(family)
    partial = LanguageModel(whole.model, whole.tokens.tokenizer, replace(whole.family, **change))
    assert whole.joins(1)
    assert not partial.joins(1)
    fast, slow = (make("rome", model).compute_update(REQUEST)[0] for make, model in ((build, partial), (plain, whole)))
    assert [w for w in recwarn if "fast path" in str(w.message)]
    for name, update in slow.items():
        assert torch.allclose(fast[name].dense(), update.dense(), atol=1e-6)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_mixtures_of_experts_are_refused_in_one_line(model_type):
    with pytest.raises(UserError, match=r"mixture of \d+ experts: a layer has no single down-projection"):
        ModelFamily.of(AutoConfig.for_model(model_type))


def test_what_cannot_be_edited_is_named():
    with pytest.raises(UserError, match=r"got torch.nn.modules.linear.Bilinear; mixtures of experts"):
        stores_transposed(torch.nn.Bilinear(2, 2, 2))
    quantised = torch.nn.Linear(2, 2)
    quantised.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        stores_transposed(quantised)
