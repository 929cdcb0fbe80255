"""The PRUNE callback against PRUNE written out with full SVDs, on editing modules and on anybody's."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_spectral import dense_prune
from torch import nn
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.spectral import sigma_max
from prune_lightning.types import EditBatch, EditRequest, WeightUpdate

BASE = 1.3


class RandomEdits(EditingModule):
    """A method whose updates are random but large, and do not depend on the model."""

    def compute_update(self, requests):
        generator = torch.Generator().manual_seed(self.num_edits)
        sides = [torch.randn(32, 1, generator=generator, dtype=torch.float64) for _ in range(2)]
        name = self.language_model.rewrite_name(1)
        return {name: WeightUpdate(sides[0], sides[1])}, [{} for _ in requests]


def fit(module, batches, *callbacks, **kwargs):
    trainer = quiet_trainer(*callbacks, **kwargs)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def edits(count, from_base=False):
    return [EditBatch((EditRequest(i, "Ann", "Ann is", "old"),), from_base) for i in range(count)]


def expected_weight(module, original, steps, accumulate, schedule):
    reference = sigma_max(original)
    raw = change = torch.zeros_like(original)
    for step in range(steps):
        module.num_edits = step
        update = module.compute_update([None])[0][module.language_model.rewrite_name(1)].dense()
        raw, change = raw + update, change + update
        if schedule == "each" or step == steps - 1:
            change = dense_prune(raw if accumulate == "raw" else change, BASE, reference)
    return original + change


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
@pytest.mark.parametrize("schedule", ["each", "end"])
def test_prune_on_an_editing_module_equals_full_svds(tiny, accumulate, schedule):
    module = RandomEdits(tiny("llama"), [1])
    original = module.language_model.rewrite_module(1).weight.detach().clone()
    fit(module, edits(6), PRUNE(BASE, accumulate=accumulate, schedule=schedule))
    weight = module.language_model.rewrite_module(1).weight.detach()
    expected = expected_weight(module, original, 6, accumulate, schedule)
    assert float((weight - expected).norm() / expected.norm()) < 1e-10
    assert sigma_max(expected - original) > sigma_max(original)


def test_without_restraint_the_updates_add_up(tiny):
    module = RandomEdits(tiny("gpt2"), [1])
    original = module.language_model.rewrite_module(1).weight.detach().clone()
    fit(module, edits(4))
    total = sum(
        torch.outer(
            torch.randn(32, generator=(g := torch.Generator().manual_seed(i)), dtype=torch.float64),
            torch.randn(32, generator=g, dtype=torch.float64),
        )
        for i in range(4)
    )
    assert torch.allclose(module.language_model.rewrite_module(1).weight, original + total.T, atol=1e-12)
    assert module.num_edits == 4


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_end_schedule_restrains_snapshots_only(tiny, accumulate):
    module = RandomEdits(tiny("llama"), [1])
    weight = module.language_model.rewrite_module(1).weight
    original, seen = weight.detach().clone(), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = weight.detach().clone()
            with pl_module.evaluation_view():
                seen.append(weight.detach().clone())
            assert torch.equal(weight, before) or trainer.is_last_batch

    fit(module, edits(3), PRUNE(BASE, schedule="end", accumulate=accumulate), Look())
    for steps, snapshot in enumerate(seen, start=1):
        expected = expected_weight(module, original, steps, "raw", "end")
        assert float((snapshot - expected).norm() / expected.norm()) < 1e-10


def test_protocols_from_base_leave_the_model_as_it_was(tiny):
    module = RandomEdits(tiny("llama"), [1])
    original = module.language_model.rewrite_module(1).weight.detach().clone()
    fit(module, edits(3, from_base=True), PRUNE(BASE))
    assert torch.equal(module.language_model.rewrite_module(1).weight, original)
    assert module.num_edits == 3


class Regression(L.LightningModule):
    """Anybody's module: plain gradient descent, strong enough to leave the reference behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)
        self.double()

    def training_step(self, batch, batch_idx):
        inputs, outputs = batch
        return ((self.second(self.first(inputs)) - outputs) ** 2).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def regression_batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator).double(), 5 * torch.randn(8, 4, generator=generator).double())
        for _ in range(count)
    ]


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_prune_on_anybodys_module(accumulate):
    batches = regression_batches(8)
    module, by_hand = Regression(), Regression()
    fit(module, batches, PRUNE(BASE, accumulate=accumulate))

    matrices = [by_hand.first.weight, by_hand.second.weight]
    originals = [weight.detach().clone() for weight in matrices]
    sums = [torch.zeros_like(weight) for weight in originals]
    optimizer = by_hand.configure_optimizers()
    for batch in batches:
        before = [weight.detach().clone() for weight in matrices]
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        with torch.no_grad():
            for i, weight in enumerate(matrices):
                sums[i] += weight - before[i]
                source = sums[i] if accumulate == "raw" else weight - originals[i]
                weight.copy_(originals[i] + dense_prune(source, BASE, sigma_max(originals[i])))
    for ours, theirs in zip((module.first.weight, module.second.weight), matrices, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_parameters_are_chosen_by_pattern_and_tied_ones_taken_once():
    module = Regression()
    callback = PRUNE(BASE, parameters=["second.*"])
    frozen = module.first.weight.detach().clone()
    fit(module, regression_batches(2), callback)
    assert list(callback.matrices) == ["second.weight"]
    assert not torch.equal(module.first.weight, frozen)
    tied = Regression()
    tied.third = nn.Linear(6, 5, bias=False)
    tied.third.weight = tied.first.weight
    fit(tied, regression_batches(1), callback := PRUNE(BASE))
    assert list(callback.matrices) == ["first.weight", "second.weight"]
    with pytest.raises(UserError, match=r"no matrix matches 'secnd\.weight': did you mean 'second.weight'"):
        fit(Regression(), regression_batches(1), PRUNE(BASE, parameters=["secnd.weight"]))


@pytest.mark.parametrize("every_n", [1, 3])
def test_resume_from_a_checkpoint_goes_on_as_if_never_stopped(tmp_path, every_n):
    def restraint():
        return PRUNE(BASE, schedule="every_n", every_n=every_n)

    batches = regression_batches(6)

    class SaveAfterThree(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    straight, resumed = Regression(), Regression()
    fit(straight, batches, restraint(), SaveAfterThree())
    rest = DataLoader(batches[3:] + batches[:3], batch_size=None)  # Lightning counts on, but begins the loader anew
    trainer = quiet_trainer(restraint())
    trainer.fit(resumed, rest, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert torch.allclose(straight.first.weight, resumed.first.weight, atol=1e-12)


def test_bad_arguments_and_strategies_are_refused():
    with pytest.raises(UserError, match="did you mean 'end'"):
        PRUNE(schedule="ends")
    with pytest.raises(UserError, match="did you mean 'raw'"):
        PRUNE(accumulate="rwa")
    with pytest.raises(UserError, match="at least 1"):
        PRUNE(every_n=0)

    class Sharded:
        strategy = FSDPStrategy()

    with pytest.raises(MisconfigurationException, match="whole weight matrices"):
        PRUNE().setup(Sharded(), Regression(), "fit")


def test_state_keys_tell_restraints_apart():
    assert PRUNE(schedule="end").state_key != PRUNE(schedule="each").state_key
    assert math.isclose(PRUNE(base=1.2).law.base, 1.2)


def test_one_callback_serves_two_modules_in_turn():
    """The second module's originals are its own, though the names are the same."""
    callback, alone = PRUNE(BASE), Regression()
    fit(Regression(), regression_batches(3), callback)
    second = Regression()
    for module in (second, alone):
        with torch.no_grad():
            module.first.weight.mul_(4)
    fit(second, regression_batches(3), callback)
    fit(alone, regression_batches(3), PRUNE(BASE))
    assert torch.equal(second.first.weight, alone.first.weight)


def test_example_in_the_documentation_runs():
    import doctest

    import prune_lightning.callbacks.prune as module

    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
