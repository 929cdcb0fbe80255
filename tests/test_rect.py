"""RECT against its definition, entry by entry."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_lightning.callbacks.rect import largest_relative_change
from test_restraint import BASE, RandomEdits, Regression, edits, fit, regression_batches
from test_spectral import dense_prune

from prune_lightning.callbacks import PRUNE, RECT
from prune_lightning.errors import UserError
from prune_lightning.spectral import sigma_max


def by_definition(change, weight, keep):
    """Sort all entries by relative change, the earlier first among equals, and keep the first ones."""
    entries = []
    for index, (d, w) in enumerate(zip(change.flatten().tolist(), weight.flatten().tolist(), strict=True)):
        ratio = abs(d / w) if w else (math.inf if d else -math.inf)
        entries.append((-ratio, index))
    count = len(entries) - int((1 - keep) * len(entries) + 1e-9)
    mask = torch.zeros(len(entries), dtype=torch.bool)
    mask[[index for _, index in sorted(entries)[:count]]] = True
    return mask.view_as(change)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.2, 0.4, 0.5, 1.0, 0.01]), st.integers(0, 1000))
def test_mask_keeps_exactly_the_share_with_ties_by_index(rows, columns, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    change = torch.randint(-2, 3, (rows, columns), generator=generator).double()  # zeros and many ties
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).double()
    assert torch.equal(largest_relative_change(change, weight, keep), by_definition(change, weight, keep))


@pytest.mark.parametrize("keep", [0.2, 0.4])
@pytest.mark.parametrize("then_prune", [False, True])
def test_on_an_editing_module(tiny, keep, then_prune):
    """Each step is masked against the weight before it; PRUNE, listed after, restrains the sum of the masked steps."""
    module = RandomEdits(tiny("gpt2"), [1])
    parameter = module.language_model.rewrite_module(1).weight
    original = parameter.detach().T.clone()
    fit(module, edits(4), *([RECT(keep), PRUNE(BASE)] if then_prune else [RECT(keep)]))
    total, weight = torch.zeros_like(original), original
    for step in range(4):
        module.run.move_to(step, step)
        (update,) = module.compute_update([None])[0].values()
        total = total + update.dense() * by_definition(update.dense(), weight, keep)
        weight = original + (dense_prune(total, BASE, sigma_max(original)) if then_prune else total)
    assert torch.allclose(parameter.detach().T, weight, rtol=1e-9, atol=1e-10)


def test_on_anybodys_module():
    module, by_hand = Regression(), Regression()
    fit(module, regression_batches(5), callback := RECT(0.4))
    optimizer = by_hand.configure_optimizers()
    for batch in regression_batches(5):
        before = [p.detach().clone() for p in by_hand.parameters()]
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, start in zip(by_hand.parameters(), before, strict=True):
                weight.copy_(start + (weight - start) * by_definition(weight - start, start, 0.4))
    for ours, theirs in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert 0 < callback.metrics["restraint/kept_norm"] < 1


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_before_prune_on_anybodys_module(accumulate):
    """Both look at one copy of the weights: a step is what the optimizer did, whatever PRUNE took away before."""
    module, by_hand = Regression(), Regression()
    fit(module, regression_batches(6), RECT(0.4), PRUNE(BASE, accumulate=accumulate))
    weights, optimizer = list(by_hand.parameters()), by_hand.configure_optimizers()
    originals = [w.detach().clone() for w in weights]
    sums = [torch.zeros_like(w) for w in originals]
    for batch in regression_batches(6):
        before = [w.detach().clone() for w in weights]
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        with torch.no_grad():
            for i, weight in enumerate(weights):
                kept = (weight - before[i]) * by_definition(weight - before[i], before[i], 0.4)
                sums[i] += kept
                change = sums[i] if accumulate == "raw" else before[i] + kept - originals[i]
                weight.copy_(originals[i] + dense_prune(change, BASE, sigma_max(originals[i])))
    for ours, theirs in zip(module.parameters(), weights, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_order_is_checked():
    with pytest.raises(UserError, match="list it first"):
        fit(Regression(), regression_batches(1), PRUNE(BASE), RECT(0.4))


def test_a_skipped_edit_leaves_the_weights_alone(tiny):
    class SecondIsBroken(RandomEdits):
        def compute_update(self, requests):
            updates, details = super().compute_update(requests)
            if self.num_requests == 1:
                next(iter(updates.values())).left[0] = float("inf")
            return updates, details

    module, seen = SecondIsBroken(tiny("llama"), [1]), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.language_model.rewrite_module(1).weight.detach().clone())

    with pytest.warns(UserWarning, match="not finite"):
        fit(module, edits(2), RECT(0.2), Look())
    assert torch.equal(*seen)


@pytest.mark.parametrize("keep", [0.0, 1.5, -0.1])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(UserError, match="keep"):
        RECT(keep)
