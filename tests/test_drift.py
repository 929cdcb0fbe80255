"""Drift from the unedited model: against a dense computation in double precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import ROUNDING, build_tiny
from test_configs import compose

from prune_lightning.bundled.world import load_world
from prune_lightning.errors import UserError
from prune_lightning.evaluation.case_rows import resampled
from prune_lightning.evaluation.drift import Drift
from prune_lightning.evaluation.measurement import Stream
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.metrics import drift as drift_metric
from prune_lightning.metrics.drift import kl_divergence, seen_change
from prune_lightning.types import DenseUpdate, LowRankUpdate

TEXT = "The old king walked to the river in the morning, and the queen forgot the market. " * 8


def watched(model, *layers, **options):
    """Return a drift of some layers' down-projections, and these matrices by name."""
    matrices = {
        model.rewrite_name(layer): EditedMatrix(
            model.rewrite_name(layer), model.rewrite_module(layer).weight, model.family.model_type == "gpt2"
        )
        for layer in layers
    }
    drift = Drift(**{"length": 16, "token_budget": 40, **options})
    drift.text = TEXT
    drift.prepare(Stream((), matrices))
    return drift, matrices


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_divergence_equals_its_definition(size, monkeypatch):
    torch.manual_seed(0)
    before = torch.randn(50, 300) * 4
    after = before + size * torch.randn(50, 300)
    ours, theirs = before.double().log_softmax(-1), after.double().log_softmax(-1)
    expected = (ours.exp() * (ours - theirs)).sum(-1)
    found = kl_divergence(before, after)
    # Logits of 4 are known to 2e-7, so that the divergence of near ones has 2e-7 / size as its relative error.
    assert torch.allclose(found.double(), expected, rtol=1e-5 + 1e-6 / size)
    assert (kl_divergence(before, before) == 0).all()
    monkeypatch.setattr(drift_metric, "_CACHED", 7 * 300)  # in pieces of seven rows
    assert torch.equal(kl_divergence(before, after), found)


def test_divergence_of_broken_logits_is_infinite():
    logits = torch.tensor([[0.0, 1.0], [0.0, math.nan], [0.0, math.inf]])
    assert kl_divergence(torch.zeros(3, 2), logits).isinf().tolist() == [False, True, True]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_scores_equal_a_dense_computation(model_type):
    """Gemma 2 caps its logits behind the head, for both models."""
    model = build_tiny(model_type)
    drift, matrices = watched(model, 0, 2)
    assert drift.measure(model).scores == {
        "kl": pytest.approx(0.0, abs=ROUNDING**2),
        "agreement": 1.0,
        "num_nonfinite": 0.0,
        "change": 0.0,
        **{f"change/{name}": 0.0 for name in matrices},
    }
    unedited = copy.deepcopy(model)
    torch.manual_seed(1)
    for scale, matrix in zip((0.02, 0.1), matrices.values(), strict=True):
        rows, columns = matrix.original().shape
        matrix.add(LowRankUpdate(scale * torch.randn(rows, 2).double(), torch.randn(columns, 2).double()))
    measured = drift.measure(model)

    ids = drift._rows
    assert len(ids) > 3
    with torch.no_grad():
        both = [one(ids, torch.ones_like(ids)).double() for one in (unedited, model)]
    before, after = (logits.log_softmax(-1) for logits in both)
    kl = (before.exp() * (before - after)).sum(-1)
    same = (before.argmax(-1) == after.argmax(-1)).double()
    # Some norms and caps run in single precision.
    assert measured.scores["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert measured.scores["agreement"] == pytest.approx(float(same.mean()))
    assert [row["kl"] for row in measured.cases] == pytest.approx(kl.mean(1).tolist(), rel=1e-5)
    per_case = resampled(measured.cases, ["kl", "agreement"])
    assert per_case["kl"][0] == pytest.approx(measured.scores["kl"])
    for layer, (name, matrix) in zip((0, 2), matrices.items(), strict=True):
        keys: list[torch.Tensor] = []
        handle = unedited.rewrite_module(layer).register_forward_pre_hook(
            lambda _, args, keys=keys: keys.append(args[0])
        )
        with torch.no_grad():
            unedited(ids, torch.ones_like(ids))
        handle.remove()
        flat = keys[0].flatten(0, 1).double()
        second, delta, original = flat.T @ flat / len(flat), matrix.delta().double(), matrix.original().double()
        expected = math.sqrt(float((delta @ second @ delta.T).trace() / (original @ second @ original.T).trace()))
        assert measured.scores[f"change/{name}"] == pytest.approx(expected, rel=1e-5)
    changes = [measured.scores[f"change/{name}"] for name in matrices]
    assert measured.scores["change"] == max(changes)


def test_batches_and_repetition_change_nothing():
    model = build_tiny("llama")
    drifts = [watched(model, 1, token_budget=budget)[0] for budget in (16, 64, 1000)]
    for drift in drifts:
        drift.measure(model)
    with torch.no_grad():
        model.rewrite_module(1).weight.mul_(1.5)
    found = [drift.measure(model).scores["kl"] for drift in drifts for _ in range(2)]
    assert found[0] > 1e-4
    assert found == pytest.approx([found[0]] * 6, rel=1e-9)


def test_a_broken_model_has_an_infinite_drift():
    model = build_tiny("gpt2")
    drift, matrices = watched(model, 1)
    drift.measure(model)
    (matrix,) = matrices.values()
    matrix.add(DenseUpdate(torch.full_like(matrix.original(), math.nan)))
    measured = drift.measure(model)
    assert measured.scores["kl"] == math.inf
    assert measured.scores["agreement"] == 0.0
    assert measured.scores["num_nonfinite"] == drift._rows.numel()
    assert math.isnan(measured.scores["change"])
    assert list(resampled(measured.cases, ["kl", "agreement"])) == ["agreement"]  # no interval around infinity


def test_seen_change_counts_only_directions_of_the_keys():
    keys = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    original, delta = torch.eye(3), torch.zeros(3, 3)
    delta[0, 2] = 7.0
    assert float(seen_change(keys, delta, original)) == 0.0
    delta[0, 1] = 1.0
    assert float(seen_change(keys, delta, original)) == pytest.approx(math.sqrt(4 / 5))


def test_text_of_a_file_and_texts_that_are_too_short(tmp_path, bundled_shared):
    path = tmp_path / "text.txt"
    path.write_text("One river.")
    assert Drift(str(path), length=4).measure(bundled_shared).scores["kl"] < ROUNDING**2  # it grows with the square
    path.write_text("a")
    with pytest.raises(UserError, match="has only 1 tokens"):
        Drift(str(path)).measure(bundled_shared)
    with pytest.raises(UserError, match="no file"):
        Drift(str(tmp_path / "nothing.txt"))
    assert Drift(str(tmp_path / "nothing.txt"), enabled=False).enabled is False


def test_edits_of_the_head_are_refused(bundled):
    drift = Drift()
    weight = bundled.model.get_output_embeddings().weight
    drift.prepare(Stream((), {"lm_head.weight": EditedMatrix("lm_head.weight", weight, False)}))
    with pytest.raises(UserError, match=r"evaluation\.drift\.enabled=false"):
        drift.measure(bundled)


def test_shipped_text_is_long_enough_and_names_no_edited_subject(bundled_shared):
    drift = Drift(max_tokens=None)
    drift.measure(bundled_shared)
    assert drift.facts()["tokens"] > 2000
    assert not [subject for subject in load_world().subjects if f" {subject} " in drift.text]
    assert compose().evaluation.drift.enabled
    assert compose("model=gpt2", "evaluation=editing").evaluation.drift.enabled
