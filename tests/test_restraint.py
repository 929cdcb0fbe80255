"""The PRUNE callback against PRUNE written out with full SVDs, on editing modules and on anybody's."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_spectral import dense_law, dense_prune
from torch import nn
from torch.utils.data import DataLoader

from prune_lightning.bundled.world import EDIT_PHRASING, load_world
from prune_lightning.callbacks import PRUNE, RECT, SpectralRestraint
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.models.hooks import capture
from prune_lightning.spectral import HardClip, Logarithm, NonFiniteChange, sigma_max, spectral_correction
from prune_lightning.types import EditBatch, EditRequest, LowRankUpdate

BASE = 1.3


class RandomEdits(EditingModule):
    """A method whose updates are random but large, and do not depend on the model."""

    def compute_update(self, requests):
        generator = torch.Generator().manual_seed(self.num_requests)
        sides = [torch.randn(32, 1, generator=generator, dtype=torch.float64) for _ in range(2)]
        name = self.language_model.rewrite_name(1)
        return {name: LowRankUpdate(sides[0], sides[1]).to(self.language_model.device)}, [{} for _ in requests]


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
        module.run.move_to(step, step)
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
    assert module.num_requests == 4


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_end_schedule_restrains_snapshots_only(tiny, accumulate):
    module = RandomEdits(tiny("llama"), [1])
    weight = module.language_model.rewrite_module(1).weight
    original, seen = weight.detach().clone(), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = weight.detach().clone()
            with pl_module.run.evaluation_view():
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
    assert module.num_requests == 3


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
    for patterns in (None, ["*"], ["third.weight", "second.*"]):  # a tied matrix goes by its first name
        fit(tied, regression_batches(1), callback := PRUNE(BASE, parameters=patterns))
        assert sorted(callback.matrices) == ["first.weight", "second.weight"]
    with pytest.raises(UserError, match=r"no matrix matches 'secnd\.weight': did you mean 'second.weight'"):
        fit(Regression(), regression_batches(1), PRUNE(BASE, parameters=["secnd.weight"]))


@pytest.mark.parametrize("every_n", [1, 3])
def test_resuming_from_a_checkpoint_equals_an_uninterrupted_run(tmp_path, every_n):
    def restraint():
        return PRUNE(BASE, schedule="every_n", every_n=every_n)

    batches = regression_batches(6)

    class SaveAfterThree(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    straight, resumed = Regression(), Regression()
    fit(straight, batches, restraint(), SaveAfterThree())
    rest = DataLoader(batches[3:] + batches[:3], batch_size=None)  # Lightning counts on, but restarts the loader
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
    with pytest.raises(UserError, match="did you mean 'skip'"):
        PRUNE(non_finite="skp")

    for strategy in (FSDPStrategy, DeepSpeedStrategy, XLAStrategy):
        trainer = type("Sharded", (), {"strategy": object.__new__(strategy)})
        with pytest.raises(MisconfigurationException, match=f"{strategy.__name__} cannot give.*ModelParallelStrategy"):
            PRUNE().setup(trainer, Regression(), "fit")


def test_state_keys_tell_restraints_apart():
    keys = {
        PRUNE(schedule="end").state_key,
        PRUNE().state_key,
        SpectralRestraint(HardClip()).state_key,
        RECT().state_key,
    }
    assert len({*keys, PRUNE(2.0).state_key, PRUNE(schedule="every_n", every_n=2).state_key}) == 6
    assert SpectralRestraint(HardClip()).state_key == SpectralRestraint(HardClip()).state_key


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


def test_resuming_without_the_originals_is_refused(tmp_path, tiny):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    def resume(module, data, *callbacks):
        loader = DataLoader(data, batch_size=None)
        quiet_trainer(*callbacks).fit(module, loader, ckpt_path=tmp_path / "two.ckpt", weights_only=True)

    fit(Regression(), regression_batches(3), PRUNE(BASE), Save())
    for other in (PRUNE(BASE + 1), PRUNE(BASE, accumulate="raw"), SpectralRestraint(HardClip())):
        with pytest.raises(UserError, match=r"does not hold the original of first\.weight"):
            resume(Regression(), regression_batches(3), other)
    fit(RandomEdits(tiny("llama"), [1]), edits(3), Save())  # an editing module keeps the originals itself
    resume(resumed := RandomEdits(tiny("llama"), [1]), edits(3), PRUNE(BASE))
    assert resumed.num_requests == 3


@pytest.mark.parametrize("schedule", ["every_n", "end"])
def test_a_restrained_snapshot_is_restored_bit_for_bit(schedule):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            callback, weights = trainer.callbacks[0], list(pl_module.parameters())
            before = [w.detach().clone() for w in weights], {n: m.change for n, m in callback.matrices.items()}
            with callback.restrained_snapshot():
                seen.append(not torch.equal(weights[0], before[0][0]))
            assert all(torch.equal(w, b) for w, b in zip(weights, before[0], strict=True))
            assert all(torch.equal(m.change, before[1][n]) for n, m in callback.matrices.items())

    callback = PRUNE(20.0, schedule=schedule, every_n=2 if schedule == "every_n" else 1, accumulate="raw")
    fit(Regression().float(), [tuple(t.float() for t in b) for b in regression_batches(5)], callback, Look())
    assert any(seen)


@pytest.mark.parametrize("schedule", ["each", "every_n", "end"])
def test_every_edit_from_the_base_is_restrained_before_it_is_scored(tiny, schedule):
    module, seen = RandomEdits(tiny("llama"), [1]), []
    weight = module.language_model.rewrite_module(1).weight
    original, every_n = weight.detach().clone(), 2 if schedule == "every_n" else 1

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with pl_module.run.evaluation_view():
                seen.append(sigma_max(weight.detach() - original))

    fit(module, edits(3, from_base=True), SpectralRestraint(HardClip(), schedule=schedule, every_n=every_n), Look())
    assert seen == pytest.approx([sigma_max(original)] * 3)


def test_two_restraints_of_one_kind_may_differ_in_any_argument():
    fit(Regression(), regression_batches(1), PRUNE(2.0, parameters=["first.*"]), PRUNE(3.0, parameters=["second.*"]))


def test_a_law_that_returns_nonsense_is_refused():
    for law in (lambda sigma, reference: sigma * float("nan"), lambda sigma, reference: sigma[:0]):
        with pytest.raises(UserError, match="one finite value for each"):
            fit(Regression(), regression_batches(2), SpectralRestraint(law))


class Embedded(L.LightningModule):
    """A bundled model of 16-bit weights, embeddings tied to its head, Conv1D inside."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model = model.to(dtype).requires_grad_(True)

    def training_step(self, batch, batch_idx):
        return 50 * self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_tied_heads_conv1d_and_16_bit_weights(tiny, dtype):
    module = Embedded(tiny("gpt2").model, dtype)
    originals = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    batches = [torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    callback = SpectralRestraint(HardClip(), parameters=["*.wte.weight", "*lm_head.weight", "*.mlp.c_proj.weight"])
    fit(module, batches, callback, gradient_clip_val=10.0)
    assert [name.split(".", 2)[-1] for name in callback.matrices] == ["wte.weight"] + [
        f"h.{layer}.mlp.c_proj.weight" for layer in range(3)
    ]
    slack = 1e-4 if dtype == torch.float32 else 0.05
    for name in callback.matrices:
        weight = module.get_parameter(name)
        assert weight.dtype == dtype
        change, reference = weight.detach().double() - originals[name], sigma_max(originals[name])
        assert sigma_max(change) <= reference * (1 + slack), name
    assert callback.metrics["restraint/num_above"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_updates_add_up_in_16_bit_weights(tiny, dtype):
    """The sum is kept in fp32: a thousand updates below the weights' resolution are not lost; the loss is reported."""
    module = RandomEdits(tiny("llama", dtype), [1])
    (matrix,) = module.edited_matrices().values()
    step = LowRankUpdate(torch.full((32, 1), 1e-3), torch.full((32, 1), 1e-2))
    first = matrix.weight().clone()
    matrix.add(step)
    unmoved = float((first == matrix.weight()).float().mean())
    assert (unmoved > 0.9) == (dtype == torch.bfloat16)
    for _ in range(999):
        matrix.add(step)
    assert torch.allclose(matrix.delta(), torch.full((32, 32), 1e-2), rtol=1e-3)
    moved = float((matrix.weight().float() - first.float()).mean())
    assert moved == pytest.approx(1e-2, rel=0.05)
    lost = float(((matrix.weight().float() - first.float()) - matrix.delta()).norm() / matrix.delta().norm())
    assert matrix.rounding_loss() == pytest.approx(lost, rel=1e-3, abs=1e-4)
    assert (matrix.rounding_loss() > 1e-3) == (dtype == torch.bfloat16)


class Broken(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 else loss


def test_a_change_that_is_not_finite_is_refused_or_skipped():
    with pytest.raises(NonFiniteChange, match=r"first\.weight: .*NaN or infinity.*non_finite=skip"):
        fit(Broken(), regression_batches(3), PRUNE(BASE))
    with pytest.warns(UserWarning, match=r"first\.weight.*skipped"):
        fit(Broken(), regression_batches(3), PRUNE(BASE, non_finite="skip"))


def test_a_zero_matrix_has_no_reference_and_is_reported_before_training():
    module = Regression()
    with torch.no_grad():
        module.second.weight.zero_()
    with pytest.raises(UserError, match=r"second\.weight is zero or not finite before training"):
        fit(module, regression_batches(1), PRUNE(BASE, schedule="end"))


def test_reference_is_computed_once_per_original_and_travels_with_the_checkpoint(monkeypatch):
    import prune_lightning.callbacks.spectral_restraint as module

    computed = []
    monkeypatch.setattr(module, "sigma_max", lambda original: computed.append(1) or sigma_max(original))
    callback = PRUNE(BASE)
    fit(Regression(), regression_batches(2), callback)
    fit(Regression(), regression_batches(2), callback)  # the same originals again
    assert len(computed) == 2
    other = PRUNE(BASE)
    other.load_state_dict({"matrices": {}, "references": callback.state_dict()["references"]})
    fit(Regression(), regression_batches(2), other)
    assert len(computed) == 2
    changed = Regression()
    with torch.no_grad():
        changed.first.weight[0, 0] += 1e-9
    fit(changed, regression_batches(2), other)
    assert len(computed) == 3


class Remember(L.pytorch.loggers.logger.DummyLogger):
    """A logger that records its calls."""

    def __init__(self):
        super().__init__()
        self.rows, self.images = [], []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_image(self, key, images, step=None):
        self.images.append((key, images, step))


def test_figures_of_a_restraint_are_logged_on_the_right_axis(tiny):
    logger = Remember()
    fit(RandomEdits(tiny("llama"), [1]), edits(3), callback := PRUNE(BASE), logger=logger, log_every_n_steps=1)
    assert [step for step, _ in logger.rows] == [1, 2, 3]
    last = logger.rows[-1][1]
    assert last == callback.metrics
    quiet = Remember()
    fit(RandomEdits(tiny("llama"), [1]), edits(3), PRUNE(BASE), logger=quiet, log_every_n_steps=0)
    fit(RandomEdits(tiny("llama"), [1]), edits(3), PRUNE(BASE, schedule="end"), logger=quiet)
    assert [step for step, _ in quiet.rows] == [3]
    assert last["restraint/num_above"] == 3
    assert sum(value for name, value in last.items() if "/path_" in name) == 1
    (matrix,) = callback.matrices.values()
    assert last["restraint/sigma_bound"] == pytest.approx(sigma_max(matrix.change.master), rel=1e-9)


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
def test_a_thousand_edits_restrained_at_every_step_equal_full_svds(bundled, accumulate):
    """On the bundled model's weight, with keys of its own facts; the weights are fp32, the full SVDs fp64."""
    module = bundled.rewrite_module(0)
    original = module.weight.detach().T.double()
    reference, law = sigma_max(original), Logarithm(1.5)
    prompts = [fact.phrasings[EDIT_PHRASING] for fact in load_world().facts[:1000]]
    keys = []
    for group in range(0, 1000, 100):
        rows = [bundled.tokens.encode(prompt) for prompt in prompts[group : group + 100]]
        ids, mask = bundled.tokens.pad(rows, bundled.device)
        with torch.no_grad(), capture(inputs=[module]) as seen:
            bundled(ids, mask)
        keys.append(seen.inputs[0][torch.arange(len(rows)), mask.sum(1) - 1])
    keys = torch.cat(keys)
    values = torch.randn(1000, original.shape[0], generator=torch.Generator().manual_seed(0)) * 0.05

    matrix = EditedMatrix("weight", module.weight, transposed=True)
    change, worst = torch.zeros_like(original), 0.0
    for step, (key, value) in enumerate(zip(keys, values, strict=True), start=1):
        matrix.add(LowRankUpdate(value[:, None], key[:, None]))
        correction = spectral_correction(matrix.change, law, reference).correction
        change += torch.outer(value.double(), key.double())
        if accumulate == "raw":
            matrix.withhold(correction)
            expected = dense_law(change, law, reference) if step % 50 == 0 else change
        else:
            change = expected = dense_law(change, law, reference)
            if correction is not None:
                matrix.subtract(correction)
        if step % 50 == 0:
            error = (matrix.weight().double() - original - expected).norm() / expected.norm()
            worst = max(worst, float(error))
    assert sigma_max(change) > reference
    assert worst < 1e-5


def test_example_in_the_documentation_runs():
    import doctest

    import prune_lightning.callbacks.prune as module

    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
