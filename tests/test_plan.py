"""The plan's figures against what the same computation does, and its word on what would not fit."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FAMILIES, load_path
from hydra.utils import instantiate
from test_configs import compose
from test_fuzz import command_line
from transformers import AutoConfig, LlamaConfig

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.tasks import costs, plan
from prune_lightning.tasks.costs import Machine
from prune_lightning.tasks.counting import Counter, ShapeModel


@pytest.fixture(scope="module")
def shapes() -> ShapeModel:
    return ShapeModel(AutoConfig.from_pretrained(load_path()), torch.float32)


def setting(shapes, *overrides, edits=5):
    config = compose("experiment=plan", f"data.num_edits={edits}", *overrides)
    stream = instantiate(config.data)
    stream.setup()
    return plan.settings(config, shapes, stream)[0]


def test_work_on_the_meta_device_is_the_work_of_the_model(shapes, bundled_shared):
    """The same pass, once without numbers and once with them."""
    ids = torch.zeros(3, 11, dtype=torch.long)
    mask = torch.zeros(3, 1, 11, 11)
    with torch.no_grad(), Counter() as real:
        bundled_shared.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    counted = shapes.forward(3, 11, 33)
    assert counted.flops == pytest.approx(real.flops, rel=0.02)  # attention on the CPU is one kernel, not counted
    weights = sum(p.numel() for n, p in bundled_shared.model.named_parameters() if n.startswith("transformer.h"))
    assert counted.flops == pytest.approx(2 * 33 * (weights + 2048 * 192), rel=0.03)
    assert real.operations <= counted.operations < 2 * real.operations, "attention falls into its parts there"
    step = shapes.step(1, 3, 11, 33)
    assert counted.flops < 2 * step.flops < 3 * counted.flops, "half of the blocks, forwards and backwards"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_counted(family, tiny):
    shapes = ShapeModel(tiny(family).model.config, torch.float32)
    step = shapes.step(1, 2, 5, 4)
    assert step.flops > 0 < step.saved
    assert shapes.edited_shape(1) == (32, 32)


def test_memory_of_the_matrices_is_what_they_hold(shapes, bundled_shared, bundled):
    found = costs.memory(shapes, setting(shapes, "method=memit"))
    moments = {layer: SecondMoments(None).compute(bundled_shared, [layer])[layer] for layer in (0, 1)}
    held = sum(m.matrix.nbytes + m._cholesky.nbytes for m in moments.values())
    assert found["second moments"] == held
    parameters = {p.data_ptr(): p.nbytes for p in bundled.model.parameters()}
    assert found["weights"] == pytest.approx(sum(parameters.values()), rel=0.01)
    config = compose("method=memit").method
    module = instantiate(config, language_model=bundled, second_moments=SecondMoments(None), _convert_="all")
    matrices = module.edited_matrices().values()
    assert found["originals of edited matrices"] == sum(m._original.nbytes for m in matrices)
    assert found["masters of changes"] == sum(m.change.master.nbytes for m in matrices)


def test_formulas_know_the_methods(shapes):
    memit, alpha = setting(shapes, "method=memit"), setting(shapes, "method=alphaedit")
    rome = setting(shapes, "method=rome", "restraint=none")
    assert (memit.one_by_one, memit.past_keys, alpha.past_keys, alpha.null_space) == (False, False, True, True)
    assert rome.one_by_one
    assert costs.memory(shapes, rome)["restraint"] == 0 < costs.memory(shapes, memit)["restraint"]
    assert "protected keys" in costs.memory(shapes, alpha)
    assert setting(shapes, "restraint=rect").restraint == "dense"
    assert (memit.prefixes, memit.steps) == (6, 20)
    few, many = (setting(shapes, "method=memit", edits=n) for n in (5, 500))
    assert costs.disk(shapes, many)["ledger of edits"] == 100 * costs.disk(shapes, few)["ledger of edits"]
    batched = setting(shapes, "method=memit", "data.protocol=sequential_batched", "data.batch_size=5")
    assert (batched.together, batched.rows) == (5, 35)
    slow, fast = Machine(1e9, 1e9, 1e9, 1e-5), Machine(2e9, 2e9, 2e9, 5e-6)
    for s in (memit, alpha, rome):
        once, again = costs.time(shapes, s, slow), costs.time(shapes, s, fast)
        assert sum(once.values()) == pytest.approx(2 * sum(again.values()))


def test_plan_of_a_large_model_says_what_does_not_fit(tmp_path, capsys):
    """Llama-3-8B's shape, from a configuration alone."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "model")
    arguments = ("experiment=plan", "model=llama-3-8b", f"model.path={tmp_path / 'model'}", "method=memit")
    code = command_line(tmp_path / "run", *arguments, "plan.tflops=300", "plan.memory_gb=24")
    shown = capsys.readouterr().out
    assert code == 0
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["memory_bytes"]["weights"] == pytest.approx(16.06e9, rel=0.001)
    assert found["memory_bytes"]["second moments"] == 5 * 2 * 14336**2 * 8
    assert found["disk_bytes"]["statistics, kept"] == 5 * 14336**2 * 4
    assert found["machine"]["flops"] == 3e14
    assert found["does_not_fit"]
    assert "memory: " in shown.replace("\n", " ")
    assert "4 characters a token" in shown


def test_what_cannot_be_planned_is_said(shapes, tmp_path, capsys):
    config = compose("experiment=plan", "method.layers=[9]")
    stream = BundledWorld(num_edits=1)
    stream.setup()
    with pytest.raises(UserError, match="layer 9 is outside"):
        plan.settings(config, shapes, stream)
    assert command_line(tmp_path / "run", "experiment=plan", "model.path=./nowhere") == 2
    assert "no folder './nowhere'" in capsys.readouterr().err
