"""WISE against the public code, and its side memories by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_lightning.editor import Editor
from prune_lightning.errors import UserError
from prune_lightning.methods.side_weights import Sharding, SideWeights, ties
from prune_lightning.methods.wise import WISE, Margins
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditRequest

ORACLES = SHARED / "oracles"


class Published(WISE):
    """The public run's rows, padded on the left, with distances over padding and one position too many in the loss."""

    rows: dict[str, torch.Tensor]

    def _part(self, number, name):
        return self.rows[f"edit{number}.{name}"]

    def target_batch(self, request):
        number = self.run.num_requests
        ids, mask, labels = (self._part(number, name)[:-1] for name in ("input_ids", "attention_mask", "labels"))
        count = len(ids)
        rows, last = torch.arange(count), torch.full((count,), ids.shape[1] - 2)
        label = labels[:, -1]
        return SimpleNamespace(
            ids=ids,
            mask=mask,
            rows=rows,
            positions=last,
            losses=lambda logits: -logits.log_softmax(-1)[rows, label] / 2,
        )

    def _unrelated(self, number):
        return self._part(number, "input_ids")[-1:], self._part(number, "attention_mask")[-1:]

    def _averaged(self, mask):
        return torch.ones_like(mask).bool()


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
def test_edits_match_the_public_code():
    about = json.loads((ORACLES / "oracles_2026.json").read_text())
    setting, requests = about["methods"]["wise"]["hyper_parameters"], about["requests"]
    theirs = {
        name.removeprefix("wise."): tensor
        for name, tensor in load_file(ORACLES / "oracles_2026.safetensors").items()
        if name.startswith("wise.")
    }
    model = load_language_model(str(ORACLES / "oracle-gpt2"), "float64")
    model.model.set_attn_implementation("eager")  # their distances count padding, which other kinds compute otherwise
    module = Published(
        language_model=model,
        layers=[4],
        module="c_fc",
        margins=Margins(setting["alpha"], setting["beta"], setting["gamma"]),
        ratio=setting["act_ratio"],
        steps=setting["n_iter"],
        weight_decay=1e-5,
        fast=False,
    )
    module.rows = theirs
    mask = theirs["mask"].bool().T
    module.side._trained = 0, mask
    # At a learning rate of 1 an edit of forty steps amplifies a difference about ten thousandfold: that of rounding in
    # fp64, 1e-12 of the weights after the first edit, becomes 1e-10, 1e-6 and 1e-2.
    for i, tolerance in ((0, 1e-6), (1, 1e-6), (2, 1e-3), (3, 1e-2)):
        record = requests[i]
        report = module.edit([EditRequest(i, record["subject"], record["prompt"], record["target_new"])])
        module.run.settle()
        (detail,) = report.details
        assert detail["losses"] == pytest.approx(theirs[f"edit{i}.losses"].tolist(), rel=tolerance, abs=tolerance)
        assert float(module.side.least) == pytest.approx(float(theirs[f"edit{i}.min_activation"]), rel=tolerance)
        if (expected := theirs.get(f"edit{i}.side_change")) is not None:
            assert float((module.side.changes[-1].T - expected).norm() / expected.norm()) < tolerance
    assert float(module.side.least) * setting["act_ratio"] == pytest.approx(float(theirs["threshold"]), rel=1e-2)
    rows = model.tokens.encode_all(setting["queries"])
    ids, real = model.tokens.pad(rows, model.device)  # all in one batch, which theirs are not
    with torch.no_grad():
        logits = model.logits_at(ids, real, torch.arange(len(rows)), real.sum(1) - 1)
    assert torch.equal(module.side.held >= 0, theirs["query.side"])
    assert torch.equal(logits.argmax(-1), theirs["query.argmax"])
    assert float((logits - theirs["query.logits"]).norm() / theirs["query.logits"].norm()) < 1e-2


def test_ties_trims_elects_and_averages():
    one = torch.tensor([[4.0, -3.0, 0.5, 0.0]])
    other = torch.tensor([[2.0, 5.0, -0.1, 1.0]])
    found = ties(torch.stack([one, other]), density=0.5)  # of each the two largest: (4, -3) and (2, 5)
    assert found.tolist() == [[3.0, 5.0, 0.0, 0.0]]


def memory(model, **options):
    sharding = Sharding(**({"ratio": 0.5, "share": 0.5, "shard": 2, "merged": 2, "density": 1.0} | options))
    path = model.rewrite_name(1).removesuffix(".weight")
    return SideWeights(path, model, torch.nn.Identity(), sharding)


def test_shards_begin_anew_and_are_merged(tiny):
    side = memory(tiny("gpt2"))
    parts = []
    for number in range(5):
        parts.append(side.trained())
        assert bool(side.current().any()) == (number % 2 == 1), "an edit goes on from the one before in its shard alone"
        values = torch.full((int(parts[-1].sum()),), float(number + 1), dtype=torch.float64)
        kept, least = torch.ones(1, dtype=torch.float64), torch.tensor([10.0 - number], dtype=torch.float64)
        side.include({"values.0": values, "kept": kept, "least": least})
        if number == 2:
            assert (side.counts.tolist(), side.least.tolist()) == ([2, 1], [9.0, 8.0])
        if number == 3:  # as soon as both are full
            assert (side.counts.tolist(), side.least.tolist()) == ([4], [7.0])
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[1], parts[2])
    assert (side.counts.tolist(), side.least.tolist(), len(side)) == ([4, 1], [7.0, 6.0], 5)
    both, first, second = parts[0] & parts[2], parts[0] & ~parts[2], parts[2] & ~parts[0]
    merged = side.changes[0]
    assert (merged[both] == 3.0).all()  # the mean of 2 and 4
    assert (merged[first] == 2.0).all()
    assert (merged[second] == 4.0).all()
    assert (side.changes[1][parts[4]] == 5.0).all()


def test_shards_that_are_merged_one_by_one_stay_in_order(tiny):
    side = memory(tiny("gpt2"), merged=1)
    for number, counts in enumerate([[1], [2], [2, 1], [4], [4, 1]]):
        values = torch.full((int(side.trained().sum()),), float(number + 1), dtype=torch.float64)
        kept, least = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        side.include({"values.0": values, "kept": kept, "least": least})
        assert side.counts.tolist() == counts


def test_the_memory_with_the_largest_distance_answers(tiny):
    side = memory(tiny("gpt2"), ratio=0.5)
    eye = torch.eye(32, dtype=torch.float64)
    side.changes, side.least = torch.stack([eye, 2 * eye]), torch.tensor([2.0, 8.0], dtype=torch.float64)
    side.counts = torch.tensor([2, 1])
    inputs = torch.zeros(3, 2, 32, dtype=torch.float64)
    inputs[0, 0, 0], inputs[1, 0, 0], inputs[2, 0, 0] = 0.5, 1.5, 3.0
    inputs[:, 1] = 100.0  # behind the prompt
    prompt = torch.tensor([[True, False]] * 3)
    assert side.chosen(inputs, torch.zeros_like(inputs), prompt).tolist() == [-1, 0, 1]


def test_margins_are_means_over_what_they_concern():
    inside, outside = torch.tensor([25.0, 10.0, 18.0]), torch.tensor([7.0])
    expected = (7.0 + 10.0 - 10.0) / 1 + 2.0 + (10.0 + 2.0) / 2
    assert float(Margins(5.0, 20.0, 10.0).loss(inside, outside)) == pytest.approx(expected)
    assert float(Margins(5.0, 20.0, 10.0).loss(torch.tensor([50.0]), torch.tensor([1.0]))) == 0.0


@pytest.mark.parametrize("wrong", [{"layers": [0, 1]}, {"share": 1.5}, {"module": "c_fcc"}])
def test_a_wrong_option_is_named(wrong, tiny):
    contexts = ContextOptions(fixed=[])
    with pytest.raises(UserError, match=r"layers|share|c_fc"):
        WISE(language_model=tiny("gpt2"), contexts=contexts, **{"layers": [1], **wrong})


# -- the merged export ------------------------------------------------------------------------------------------------
CAPITALS = (("Japan", "Rome"), ("Peru", "Oslo"))
FACTS = [{"subject": name, "prompt": f"The capital of {name} is", "target_new": new} for name, new in CAPITALS]


def logits(model, tokens, prompts):
    with torch.no_grad():
        return torch.stack([model(torch.tensor([tokens.encode(prompt)])).logits[0, -1] for prompt in prompts])


@pytest.mark.parametrize("shard", [500, 1])
def test_a_merged_export_is_the_original_weight_and_the_change(shard, tmp_path):
    """One copy as it is; of two, here one per edit, the merged one. The model that was exported stays as it was."""
    options = {"method": {"steps": 4, "shard": shard, "merged": 3, "contexts": {"lengths": []}}}
    prompts = [*(fact["prompt"] for fact in FACTS), "A dog"]
    with Editor("bundled", "wise", "none", progress=False, options=options) as editor:
        editor.edit(FACTS)
        model, side = editor._session.language_model, editor._session.module.side
        assert len(side.changes) == (2 if shard == 1 else 1)
        before, name = logits(model.model, model.tokens, prompts), f"{side.name}.weight"
        with pytest.raises(UserError, match=r"export=full: wise .*Editor\.open.*export_merged=true"):
            editor.export("full", tmp_path / "no")
        report = editor.export("full", tmp_path / "full", merged=True)
        editor.export("delta", tmp_path / "delta", merged=True)
        with pytest.raises(UserError, match="not of low rank"):
            editor.export("lora", tmp_path / "lora", merged=True)
        assert torch.equal(logits(model.model, model.tokens, prompts), before)
        change = side.changes[0] if shard == 500 else ties(side.changes, 0.53)
        original = model.model.get_parameter(name).detach().clone()
    exported = load_file(tmp_path / "full" / "model.safetensors")
    assert torch.equal(exported[name], original + change.T)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    base = load_language_model("pkg://prune_lightning.bundled/model")
    assert all(torch.equal(loaded.get_parameter(n), p) for n, p in base.model.named_parameters() if n != name)
    found, unedited = (logits(each, base.tokens, prompts) for each in (loaded, base.model))
    answered = (before != unedited).any(1)
    if shard == 500:  # the copy that answers is the exported one
        assert torch.allclose(found[answered], before[answered], rtol=1e-4, atol=1e-4)
    assert (found != unedited).any(1).all(), "without routing every prompt is answered by the copy"
    assert report.max_logit_error <= report.tolerance
    assert report.details["left_alone"] + int(answered[:2].sum()) <= report.prompts
    assert "without routing" in report.line()


def test_only_what_can_be_merged_is(tmp_path):
    with Editor("bundled", "grace", "none", progress=False, options={"method": {"steps": 2}}) as editor:
        editor.edit(FACTS[:1])
        with pytest.raises(UserError, match="grace has nothing that can be merged"):
            editor.export("full", tmp_path / "full", merged=True)
        with pytest.raises(UserError) as said:
            editor.export("full", tmp_path / "full")
        assert "merged" not in str(said.value)
