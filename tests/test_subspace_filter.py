"""Filters by leading singular directions against dense projectors from full decompositions."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from conftest import SHARED, quiet_trainer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_oracles import GivenMoments, relative
from test_restraint import RandomEdits, Regression, edits, fit, regression_batches
from test_spectral import dense_prune
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE, SubspaceFilter
from prune_lightning.errors import UserError
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.loading import load_language_model
from prune_lightning.spectral import (
    AccumulatedChange,
    FactoredMatrix,
    NonFiniteChange,
    Subspace,
    leading_directions,
    sigma_max,
)
from prune_lightning.types import DenseUpdate, EditRequest, LowRankUpdate

ROUNDING = 1e-12  # of a few products of well-conditioned fp64 matrices with up to 40 columns
ROWS, COLUMNS = 20, 40


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(count, rank=2):
    return [LowRankUpdate(random(ROWS, rank, seed=i), random(COLUMNS, rank, seed=100 + i)) for i in range(count)]


def close(ours, theirs):
    return float((ours - theirs).norm()) <= ROUNDING * float(theirs.norm())


def projected(change, left, right, strength):
    rows, columns = torch.eye(ROWS, dtype=torch.float64), torch.eye(COLUMNS, dtype=torch.float64)
    if left is not None:
        rows = rows - strength * left @ left.T
    if right is not None:
        columns = columns - strength * right @ right.T
    return rows @ change @ columns


# -- the mathematics --------------------------------------------------------------------------------------------------
def test_revives_sum_over_pairs_is_the_product_with_two_projectors():
    """The paper sums over all pairs of directions outside the leading ones."""
    original, change, count = random(ROWS, COLUMNS), random(ROWS, COLUMNS, seed=1), 5
    left, _, right = torch.linalg.svd(original)
    pairs = sum(
        (left[:, i] @ change @ right[j]) * torch.outer(left[:, i], right[j])
        for i in range(count, ROWS)
        for j in range(count, COLUMNS)
    )
    removed = Subspace(left[:, :count], right[:count].T).removed(change).dense()
    assert close(change - removed, pairs)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("left", "right"), [(3, 3), (12, 0), (0, 12), (15, 15)])
@pytest.mark.parametrize("kind", ["dense", "factored", "accumulated", "accumulated dense"])
@pytest.mark.parametrize("rank", [1, 8])
def test_every_form_takes_out_what_the_projectors_do(rank, kind, left, right, strength):
    u = torch.linalg.qr(random(ROWS, left, seed=7))[0] if left else None
    v = torch.linalg.qr(random(COLUMNS, right, seed=8))[0] if right else None
    given = updates(rank)
    dense = sum(update.dense() for update in given)
    change = dense
    if kind == "factored":
        change = FactoredMatrix(ROWS, COLUMNS, torch.device("cpu"))
        for update in given:
            change.append(update)
    elif kind != "dense":
        change = AccumulatedChange(dense)
        for update in given if kind == "accumulated" else [DenseUpdate(dense)]:
            change.add(update)
    removed = Subspace(u, v, strength).removed(change)
    assert close(dense - removed.dense(), projected(dense, u, v, strength))
    sides = (u is not None) + (v is not None)
    assert removed.left.shape[1] <= left + right
    if kind in ("factored", "accumulated") and 2 * rank * sides < left + right:
        assert removed.left.shape[1] == 2 * rank * sides, "the smaller form"


def test_the_filter_of_a_sum_is_the_sum_of_the_filtered_and_filters_once():
    u, v = torch.linalg.qr(random(ROWS, 4, seed=7))[0], torch.linalg.qr(random(COLUMNS, 6, seed=8))[0]
    one, other = random(ROWS, COLUMNS, seed=1), random(ROWS, COLUMNS, seed=2)
    for strength in (1.0, 0.5):
        subspace = Subspace(u, v, strength)
        separately = subspace.removed(one).dense() + subspace.removed(other).dense()
        assert close(subspace.removed(one + other).dense(), separately)
    left_over = one - Subspace(u, v).removed(one).dense()
    assert float(Subspace(u, v).removed(left_over).dense().norm()) < ROUNDING * float(one.norm())


def test_nothing_is_taken_out_of_nothing_and_of_what_is_not_finite():
    subspace = Subspace(None, torch.eye(COLUMNS, 3, dtype=torch.float64))
    empty = AccumulatedChange(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    assert subspace.removed(empty) is None
    assert subspace.removed(empty.master) is None
    with pytest.raises(NonFiniteChange):
        subspace.removed(empty.master + float("nan"))


# -- which directions -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "energy", "count"), [(0.5, "sigma", 2), (0.5, "sigma2", 1), (0.4, "sigma", 1)])
def test_the_fewest_directions_that_hold_the_share(share, energy, count):
    """Values 4, 3, 2, 1: shares of the sum 0.4, 0.7, 0.9, 1 and of the squares 0.53, 0.83, 0.97, 1."""
    left, right = torch.linalg.qr(random(6, 4))[0], torch.linalg.qr(random(9, 4, seed=1))[0]
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = leading_directions((left * sigma) @ right.T, share, energy)
    assert torch.allclose(found.sigma, sigma[:count], rtol=1e-12)
    assert close(found.left @ found.left.T, left[:, :count] @ left[:, :count].T)
    assert close(found.right @ found.right.T, right[:, :count] @ right[:, :count].T)


def test_equal_values_stay_together_and_all_may_be_taken():
    matrix = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    assert len(leading_directions(matrix, 0.3).sigma) == 3
    assert len(leading_directions(matrix, 1.0).sigma) == 4
    assert len(leading_directions(torch.eye(4, dtype=torch.float64), 0.1).sigma) == 4
    with pytest.raises(UserError, match="no leading directions"):
        leading_directions(torch.zeros(3, 4), 0.5)


def test_spheres_directions_are_the_eigenvectors_of_the_input_side():
    """As its code finds them: an eigendecomposition of n x n, and one more than the values within the share."""
    original = random(ROWS, COLUMNS) @ torch.diag(0.9 ** torch.arange(COLUMNS, dtype=torch.float64))
    unit = original / (original.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(unit.T @ unit / ROWS)
    values, vectors = values.flip(0), vectors.flip(1)
    count = int((values.cumsum(0) / values.sum() <= 0.5).sum()) + 1
    found = leading_directions(original, 0.5, unit_rows=True)
    assert len(found.sigma) == count
    assert close(found.right @ found.right.T, vectors[:, :count] @ vectors[:, :count].T)


# -- the callback -----------------------------------------------------------------------------------------------------
def dense_filter(original, share, strength, sides="both"):
    left, sigma, right = torch.linalg.svd(original)
    count = int((sigma.square().cumsum(0) < share * sigma.square().sum()).sum()) + 1
    rows, columns = torch.eye(len(original)).to(original), torch.eye(original.shape[1]).to(original)
    if sides != "input":
        rows = rows - strength * left[:, :count] @ left[:, :count].T
    if sides != "output":
        columns = columns - strength * right[:count].T @ right[:count]
    return lambda change: rows @ change @ columns


@pytest.mark.parametrize("sides", ["both", "input", "output"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_in_any_training_every_step_is_filtered(strength, sides):
    module, by_hand, batches = Regression(), Regression(), regression_batches(6)
    fit(module, batches, callback := SubspaceFilter(0.4, sides, strength))
    weights = [by_hand.first.weight, by_hand.second.weight]
    filters = [dense_filter(weight.detach().clone(), 0.4, strength, sides) for weight in weights]
    optimizer = by_hand.configure_optimizers()
    for batch in batches:
        before = [weight.detach().clone() for weight in weights]
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, old, taken in zip(weights, before, filters, strict=True):
                weight.copy_(old + taken(weight - old))
    for ours, theirs in zip((module.first.weight, module.second.weight), weights, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert 0 < callback.figures()["removed_share"] < 1
    assert callback.figures()["num_directions"] == (2 if sides == "both" else 1)


def test_resuming_from_a_checkpoint_equals_an_uninterrupted_run(tmp_path):
    class SaveAfterThree(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    batches, straight, resumed = regression_batches(6), Regression(), Regression()
    fit(straight, batches, SubspaceFilter(0.4, strength=0.7), SaveAfterThree())
    rest = DataLoader(batches[3:] + batches[:3], batch_size=None)  # Lightning counts on, but restarts the loader
    trainer = quiet_trainer(SubspaceFilter(0.4, strength=0.7))
    trainer.fit(resumed, rest, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.allclose(straight.first.weight, resumed.first.weight, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_of_a_large_change_keeps_the_precision_of_the_weight(dtype, tiny):
    """The filter takes out nearly all of it: the difference is not cut down to the directions of the change."""
    model = tiny("llama")
    model.model.to(dtype)
    module = RandomEdits(model, [1])
    (matrix,) = module.edited_matrices().values()
    original = matrix.original().double()
    left, _, right = torch.linalg.svd(original)
    inside = LowRankUpdate(50 * left[:, :1], right[:1].T + 0.01 * random(32, 1))
    matrix.add(inside)
    callback = SubspaceFilter(0.5, "input")
    callback.attach(module)
    callback.restrain_all()
    assert matrix.withheld.norm() > 0.9 * inside.norm()
    expected = dense_filter(original, 0.5, 1.0, "input")(inside.dense())
    error = (matrix.delta().double() - expected).norm() / expected.norm()
    # The sum is rounded once before the subtraction, which cancels all but 1/20 of it.
    assert float(error) < 20 * 8 * torch.finfo(torch.float32).eps


def test_arguments_lora_and_a_second_restraint_that_withholds_are_refused():
    with pytest.raises(UserError, match=r"restraint\.share"):
        SubspaceFilter(0.0)
    with pytest.raises(UserError, match=r"restraint\.share"):
        SubspaceFilter(strength=1.5)
    with pytest.raises(UserError, match="did you mean 'input'"):
        SubspaceFilter(sides="inptu")
    with pytest.raises(UserError, match="did you mean 'sigma2'"):
        SubspaceFilter(energy="sigma_2")
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    with pytest.raises(UserError, match="under LoRA"):
        SubspaceFilter().attach(get_peft_model(model, LoraConfig(target_modules=["0"])))
    for pair in ((SubspaceFilter(), PRUNE(accumulate="raw")), (PRUNE(accumulate="raw"), SubspaceFilter())):
        with pytest.raises(UserError, match="both withhold"):
            fit(Regression(), regression_batches(1), *pair)
    with pytest.raises(UserError, match="list PRUNE before SubspaceFilter, which withholds a part of the sum"):
        fit(Regression(), regression_batches(1), SubspaceFilter(), PRUNE(accumulate="restrained"))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_filter_follows_prune_on_the_restrained_sum(strength, tiny):
    """The law is applied to the sum and stays; of that the filter takes its part out of the weight."""
    callbacks = PRUNE(1.3, accumulate="restrained"), SubspaceFilter(0.3, strength=strength)
    module = RandomEdits(tiny("llama"), [1])
    weight = module.language_model.rewrite_module(1).weight
    original, change = weight.detach().clone(), 0
    fit(module, edits(4), *callbacks)
    for count in range(4):
        module.run.move_to(count, count)
        (update,) = module.compute_update([None])[0].values()
        change = dense_prune(change + update.dense(), 1.3, sigma_max(original))
    assert callbacks[0].metrics["restraint/num_changed"] > 0
    expected = dense_filter(original, 0.3, strength, "both")(change)
    assert float((weight.detach() - original - expected).norm() / expected.norm()) < 1e-10


def test_an_edit_stream_with_prune_in_front_is_refused(tiny):
    with pytest.raises(UserError, match="PRUNE and SubspaceFilter both withhold"):
        fit(RandomEdits(tiny("llama"), [1]), edits(1), PRUNE(), SubspaceFilter())


# -- SPHERE's public code ---------------------------------------------------------------------------------------------
ORACLES = SHARED / "oracles"


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
@pytest.mark.parametrize("variant", ["linear_layout", "released"])
def test_memit_with_sphere_matches_its_reference(variant):
    """The public code takes the directions from the weights before each batch; so does this loop.

    On GPT-2's transposed weights the released code takes inputs for outputs, and projects the outputs.
    """
    facts = json.loads((ORACLES / "oracles_2026.json").read_text())
    setting = facts["methods"]["sphere"]["hyper_parameters"]
    tensors, moments = (load_file(ORACLES / f"{name}.safetensors") for name in ("oracles_2026", "oracles"))
    module = MEMIT(
        language_model=load_language_model(str(ORACLES / "oracle-gpt2"), "float64"),
        layers=setting["layers"],
        second_moments=GivenMoments(moments),
        value=ValueOptions(steps=20, clamp=setting["clamp_norm_factor"]),
        contexts=ContextOptions(fixed=[context.removesuffix("{}") for context in facts["memit_contexts"][1]]),
        ridge=setting["mom2_update_weight"],
    )
    module.prepare()
    requests = [
        EditRequest(r["case_id"], r["subject"], r["prompt"], r["target_new"], r["target_true"])
        for r in facts["requests"]
    ]
    originals = {name: matrix.parameter.clone() for name, matrix in module.edited_matrices().items()}
    for batch in (0, 1):
        found = module.compute_update(requests[4 * batch : 4 * batch + 4])[0]
        for layer, (name, matrix) in zip(module.layers, module.edited_matrices().items(), strict=True):
            weight = matrix.weight() if variant == "linear_layout" else matrix.weight().T
            leading = leading_directions(weight, setting["beta_hse"], unit_rows=True)
            assert len(leading.sigma) == int(tensors[f"sphere.{variant}.batch{batch}.rank.{layer}"])
            sides = (None, leading.right) if variant == "linear_layout" else (leading.right, None)
            subspace = Subspace(*sides, setting["alpha"])
            matrix.add(found[name])
            matrix.subtract(subspace.removed(found[name].dense()))
            if (theirs := tensors.get(f"sphere.{variant}.batch{batch}.weight.{layer}")) is not None:
                assert relative(matrix.parameter, theirs, originals[name]) < 1e-6
