"""How a restraint takes hold of weights: whose originals, for how long, what is refused, and what is not silent."""

from __future__ import annotations

import copy
import math
import warnings

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from prune_lightning.callbacks.hugging_face import RestraintCallback
from test_other_loops import train
from test_rect import by_definition
from test_restraint import BASE, RandomEdits, Regression, edits, fit, regression_batches
from test_spectral import dense_law, dense_prune
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from prune_lightning.callbacks import (
    PRUNE,
    RECT,
    EditEvaluation,
    EditLedger,
    EditLog,
    Guards,
    SpectralRestraint,
    SpectrumMonitor,
    SubspaceFilter,
)
from prune_lightning.errors import UserError
from prune_lightning.spectral import HardClip, Logarithm, ScaleFreeLogarithm, sigma_max

LR = 0.004  # strong enough to leave the reference behind, too weak to diverge


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


# -- the original is kept until reset() -------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_two_fits_equal_one_of_twice_the_length(same_trainer, accumulate):
    batches, straight, twice = regression_batches(4), Regression(), Regression()
    fit(straight, batches, PRUNE(BASE, accumulate=accumulate), max_epochs=2)
    callback = PRUNE(BASE, accumulate=accumulate)
    original = weights(twice)
    trainer = fit(twice, batches, callback, max_epochs=1)
    if same_trainer:
        trainer.fit_loop.max_epochs = 2
        trainer.fit(twice, DataLoader(batches, batch_size=None))
        assert trainer.global_step == 8
    else:
        fit(twice, batches, callback, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), twice.parameters(), strict=True))
    for matrix, before in zip(callback.matrices.values(), original, strict=True):
        assert torch.equal(matrix.original(), before)


def test_originals_outlast_another_module_and_follow_the_weights_into_another_wrapper():
    callback, first, second = PRUNE(BASE), Regression(), Regression()
    with torch.no_grad():
        second.first.weight.mul_(3)
    originals = weights(first), weights(second)
    for module in (first, second, first):
        fit(module, regression_batches(2), callback)
    assert [torch.equal(m.original(), w) for m, w in zip(callback.matrices.values(), originals[0], strict=True)] == [
        True,
        True,
    ]
    wrapper = nn.ModuleDict({"inner": second})
    callback.attach(wrapper)
    assert list(callback.matrices) == ["inner.first.weight", "inner.second.weight"]
    assert torch.equal(callback.matrices["inner.first.weight"].original(), originals[1][0])


def test_reset_takes_the_weights_as_they_are_now():
    module, callback = Regression(), PRUNE(BASE)
    fit(module, regression_batches(2), callback)
    callback.reset()
    with pytest.raises(UserError, match="call `attach"):
        callback.after_step(1)
    now = weights(module)
    callback.attach(module)
    assert all(torch.equal(m.original(), w) for m, w in zip(callback.matrices.values(), now, strict=True))


def test_rect_before_prune_fits_twice():
    """RECT's step begins at the weights as the second training finds them; PRUNE's original is that of the first."""
    module, callbacks = Regression(), (RECT(0.4), PRUNE(BASE))
    original = weights(module)
    fit(module, regression_batches(2), *callbacks)
    fit(module, regression_batches(2), *callbacks)
    straight = Regression()
    fit(straight, regression_batches(2), RECT(0.4), PRUNE(BASE), max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), module.parameters(), strict=True))
    late = Regression()  # RECT joins for the second training
    fit(late, regression_batches(2), prune := PRUNE(BASE))
    fit(late, regression_batches(2), RECT(0.4), prune)
    assert all(torch.equal(m.original(), w) for m, w in zip(prune.matrices.values(), original, strict=True))


def test_an_editing_module_fits_twice(tiny):
    module, callback = RandomEdits(tiny("llama"), [1]), PRUNE(BASE)
    weight = module.language_model.rewrite_module(1).weight
    original = weight.detach().clone()
    for _ in range(2):
        fit(module, edits(2), callback)
    total = sum(
        torch.outer(*(torch.randn(32, generator=g, dtype=torch.float64) for _ in range(2)))
        for g in (torch.Generator().manual_seed(i) for i in range(4))
    )
    expected = original + dense_prune(total, BASE, sigma_max(original))
    # fp64, four edits: far more than rounding leaves, far less than what a wrong original would.
    assert float((weight - expected).norm() / expected.norm()) < 1e-10


def test_the_monitor_keeps_its_originals():
    monitor, module = SpectrumMonitor(every_n=1), Regression()
    original = module.first.weight.detach().clone()
    for _ in range(2):
        fit(module, regression_batches(2), monitor)
    expected = float((module.first.weight.detach() - original).norm() / original.norm())
    assert monitor.curve[-1]["spectrum/first.weight/delta_norm_ratio"] == pytest.approx(expected, rel=1e-9)


def test_hugging_face_trains_twice(tiny, tmp_path):
    def restraint():
        return PRUNE(3.0, parameters="*.mlp.c_proj.weight")

    straight = train(tiny("gpt2").model, tmp_path, restraint(), steps=2)
    callback = restraint()
    twice = train(train(tiny("gpt2").model, tmp_path, callback, steps=2), tmp_path, callback, steps=2)
    original = dict(tiny("gpt2").model.named_parameters())
    assert callback.metrics["restraint/num_above"] > 0
    for name, matrix in callback.matrices.items():
        assert torch.equal(matrix.original(), original[name].T)  # a Conv1D, which stores in x out
        assert not torch.equal(straight.get_parameter(name), twice.get_parameter(name))


# -- nothing is silent ------------------------------------------------------------------------------------------------
def moved_by(values):
    """A layer with the identity's singular values, moved by a diagonal change."""
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    return layer, torch.diag(torch.tensor(values, dtype=torch.float64))


def test_a_law_that_cannot_bite_says_so_once_and_num_changed_tells():
    layer, change = moved_by([5.0, 3.0, 2.0, 0.5])
    callback = PRUNE()
    callback.attach(layer)
    with torch.no_grad():
        layer.weight.add_(change)
    # 1 / ln 1.2 = 5.48.
    with pytest.warns(UserWarning, match=r"weight: .* 3 of them above.*below 1 / ln\(base\) = 5\.48.*prune_scale_free"):
        callback.after_step(1)
    assert (callback.metrics["restraint/num_above"], callback.metrics["restraint/num_changed"]) == (3, 0)
    assert torch.equal(layer.weight, torch.eye(4) + change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.after_step(2)


def test_num_changed_counts_what_the_guard_lets_through():
    """log_2(s) + 1 at s0 = 1 crosses s at 2: of 8, 3 and 1.5 the first two become 4 and 1 + log_2(3)."""
    for law in (Logarithm(2.0), ScaleFreeLogarithm(2.0)):
        layer, change = moved_by([8.0, 3.0, 1.5, 0.5])
        callback = SpectralRestraint(law)
        callback.attach(layer)
        with torch.no_grad():
            layer.weight.add_(change)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            callback.after_step(1)
        assert (callback.metrics["restraint/num_above"], callback.metrics["restraint/num_changed"]) == (3, 2)
        expected = torch.tensor([5.0, 2.0 + math.log2(3), 2.5, 1.5], dtype=torch.float64)
        assert torch.allclose(layer.weight.diagonal(), expected, atol=1e-12)


@pytest.mark.parametrize("law", [Logarithm(1.2), Logarithm(8.0), ScaleFreeLogarithm(2.0), ScaleFreeLogarithm(4.0)])
@pytest.mark.parametrize("reference", [0.5, 3.0, 20.0])
def test_below_its_bound_a_law_changes_nothing_and_not_far_beyond_it_does(law, reference):
    bound = law.unchanged_below(reference)
    below = torch.linspace(reference, bound, 50, dtype=torch.float64)[1:]
    assert torch.allclose(law(below, reference), below, rtol=1e-12)
    assert float(law(torch.tensor([1e3 * bound]), reference)) < 1e3 * bound
    if bound == reference:
        assert float(law(torch.tensor([1.01 * bound], dtype=torch.float64), reference)) < 1.01 * bound


def test_a_scale_free_law_with_a_small_base_says_so_too():
    layer, change = moved_by([1.4, 1.2, 0.5, 0.5])
    callback = SpectralRestraint(ScaleFreeLogarithm(2.0))
    callback.attach(layer)
    with torch.no_grad():
        layer.weight.add_(change)
    with pytest.warns(UserWarning, match=r"2 of them above.*sigma_max / ln\(base\) = 1\.44; use a base of e or more"):
        callback.after_step(1)


def test_steps_without_attach_are_refused():
    for callback in (PRUNE(), RECT()):
        for call in (lambda c: c.after_step(1), lambda c: c.restrain_all()):
            with pytest.raises(
                UserError, match=rf"{type(callback).__name__} holds no matrices: call `attach\(module\)`"
            ):
                call(callback)


def test_one_string_is_one_pattern():
    callback = PRUNE(BASE, parameters="second.weight")
    callback.attach(Regression())
    assert list(callback.matrices) == ["second.weight"]
    assert callback.state_key == PRUNE(BASE, parameters=("second.weight",)).state_key
    monitor = SpectrumMonitor(parameters="second.*")
    fit(Regression(), regression_batches(1), monitor)
    assert list(monitor.matrices) == ["second.weight"]


def test_a_pattern_of_frozen_weights_only_is_refused_by_name():
    module = Regression()
    module.first.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"'first\.\*' matches frozen weights only, such as first\.weight"):
        PRUNE(parameters=["second.*", "first.*"]).attach(module)
    (callback := PRUNE(parameters=["*"])).attach(module)  # perhaps the first is to be unfrozen later
    assert list(callback.matrices) == ["first.weight", "second.weight"]


def test_the_hugging_face_trainer_is_told_of_its_adapter(tiny, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    for callback in (PRUNE(), RECT()):
        with pytest.raises(
            UserError, match=r"RestraintCallback\(\w+\(\.\.\.\)\)\], from prune_lightning\.callbacks\.hug"
        ):
            Trainer(tiny("gpt2").model, arguments, callbacks=[callback])


@pytest.mark.parametrize(
    "callback", [Guards(), EditLog(None), EditEvaluation([1]), EditLedger("ledger"), SpectrumMonitor()]
)
def test_the_hugging_face_trainer_is_told_what_it_can_take(callback, tiny, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    name = type(callback).__name__
    with pytest.raises(UserError, match=rf"^{name} is a callback for Lightning's Trainer\. .*RestraintCallback\(PRUNE"):
        Trainer(tiny("gpt2").model, arguments, callbacks=[callback])


def test_lightning_is_told_of_the_restraint_itself():
    adapter = RestraintCallback(RECT())
    with pytest.raises(UserError, match=r"for the Hugging Face Trainer\. .* callbacks=\[RECT\(\.\.\.\)\]$"):
        fit(Regression(), regression_batches(2), adapter)
    assert copy.copy(adapter).restraint is adapter.restraint
    assert not hasattr(adapter, "on_something_else")


@pytest.mark.parametrize("wrong", ["PRUNE", PRUNE, None, RestraintCallback(PRUNE())])
def test_the_adapter_takes_restraints_only(wrong):
    with pytest.raises(UserError, match="RestraintCallback expects a restraint"):
        RestraintCallback(wrong)


@pytest.mark.parametrize("wrong", ["model", None, Regression, Regression().parameters(), Regression().state_dict()])
def test_only_modules_are_attached_to(wrong):
    with pytest.raises(UserError, match=r"PRUNE\.attach expects a torch\.nn\.Module, but got "):
        PRUNE().attach(wrong)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PRUNE(parameters=5), "`parameters` is expected to be names"),
        (lambda: PRUNE(parameters=[5]), "`parameters` is expected to be names"),
        (lambda: PRUNE(every_n="2"), "restraint.every_n is expected to be a whole number of at least 1, but got '2'"),
        (lambda: PRUNE(every_n=1.5), "restraint.every_n is expected to be a whole number of at least 1, but got 1.5"),
        (lambda: RECT(keep="a"), "restraint.keep is expected to be a number above 0 and of at most 1, but got 'a'"),
        (lambda: SpectralRestraint("log"), "`law` is expected to be a law, such as HardClip.., but got 'log'"),
        (lambda: SpectralRestraint(Logarithm), "but got the class Logarithm"),
        (
            lambda: EditEvaluation(5),
            "evaluation.counts is expected to be a list of whole numbers of at least 0",
        ),
        (lambda: SpectrumMonitor("a"), "SpectrumMonitor.every_n is expected to be a whole number of at least 1"),
        (lambda: Guards(norm=5), "guards.norm is expected to be a guard, e.g. NormGuard.., but got 5"),
        (lambda: Guards(perplexity="text"), "guards.perplexity is expected to be a Sentinel, but got 'text'"),
    ],
)
def test_arguments_of_a_wrong_kind_are_one_line(build, message):
    with pytest.raises(UserError, match=message):
        build()


# -- LoRA -------------------------------------------------------------------------------------------------------------
def lora(module, **options):
    torch.manual_seed(3)
    return get_peft_model(module, LoraConfig(target_modules=["first", "second"], r=2, lora_alpha=6, **options))


class Adapted(L.LightningModule):
    def __init__(self, **options):
        super().__init__()
        net = Regression()
        self.net = lora(Net(net), **options)

    def training_step(self, batch, batch_idx):
        return ((self.net(batch[0]) - batch[1]) ** 2).sum()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)


class Net(nn.Module):
    def __init__(self, regression):
        super().__init__()
        self.first, self.second = regression.first, regression.second

    def forward(self, inputs):
        return self.second(self.first(inputs))


def product(layer):
    return layer.get_delta_weight("default").detach().clone()


@pytest.mark.parametrize("parameters", [None, "*base_layer.weight", "*lora_?.*", "*"])
def test_the_change_of_a_merged_weight_is_restrained_exactly(parameters):
    module, by_hand = Adapted(), Adapted()
    callback = PRUNE(4.0, parameters=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, regression_batches(6), callback)
    assert [name.rsplit("model.", 1)[1] for name in callback.matrices] == [
        "first.base_layer.weight",
        "second.base_layer.weight",
    ]
    optimizer = by_hand.configure_optimizers()
    for batch in regression_batches(6):
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
        for layer in (by_hand.net.base_model.model.first, by_hand.net.base_model.model.second):
            wanted = dense_law(product(layer), Logarithm(4.0), sigma_max(layer.base_layer.weight))
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            with torch.no_grad():  # the same A; B as least squares gives it from the dense result
                b.copy_(torch.linalg.lstsq(a.T, wanted.T / layer.scaling["default"]).solution.T)
            assert torch.allclose(product(layer), wanted, atol=1e-10)  # fp64: the product can hold it exactly
    assert callback.metrics["restraint/num_changed"] > 0
    ours, theirs = module.net.base_model.model, by_hand.net.base_model.model
    for name in ("first", "second"):
        assert torch.allclose(product(getattr(ours, name)), product(getattr(theirs, name)), rtol=1e-8, atol=1e-9)
    merged = module.net.merge_and_unload()
    assert sigma_max(merged.first.weight - Regression().first.weight) < sigma_max(Regression().first.weight) + 5


def test_a_clipped_adapter_stays_at_the_reference_and_a_look_puts_back_every_bit():
    module, callback = Adapted(), SpectralRestraint(HardClip(), schedule="end")
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = weights(pl_module)
            with callback.restrained_snapshot():
                seen.append(max(sigma_max(m.delta()) / sigma_max(m.original()) for m in callback.matrices.values()))
            assert all(torch.equal(a, b) for a, b in zip(before, weights(pl_module), strict=True))

    fit(module, regression_batches(5), callback, Look(), SpectrumMonitor(every_n=2))
    assert max(seen) == pytest.approx(1.0, abs=1e-9)
    ratios = [sigma_max(m.delta()) / sigma_max(m.original()) for m in callback.matrices.values()]
    assert max(ratios) == pytest.approx(1.0, abs=1e-9)


def test_adapters_of_other_kinds_are_refused_by_name():
    for options in ({"use_dora": True}, {}):
        module = Adapted(**options)
        if not options:
            module.net.add_adapter("other", LoraConfig(target_modules=["first"], r=2))
        with pytest.raises(
            UserError, match=r"first\.base_layer\.weight: of adapters, a restraint serves one plain LoRA"
        ):
            PRUNE().attach(module)
    with pytest.raises(UserError, match=r"under LoRA.*accumulate=restrained"):
        PRUNE(accumulate="raw").attach(Adapted())
    with pytest.raises(UserError, match=r"under LoRA.*spectral restraint"):
        RECT().attach(Adapted())


def test_lora_on_conv1d_under_the_hugging_face_trainer_resumes(tiny, tmp_path):
    def model():
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["c_fc"], r=2, fan_in_fan_out=True)
        return get_peft_model(tiny("gpt2").model, config).double()

    def run(steps, callback, **options):
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12) + 20]
        settings = {"learning_rate": 100.0, "lr_scheduler_type": "constant", "optim": "sgd", "seed": 0}
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_steps=2,
            **settings,
        )
        trainer = Trainer(net := model(), arguments, train_dataset=rows, callbacks=[RestraintCallback(callback)])
        trainer.train(**options)
        return net

    straight = run(4, callback := SpectralRestraint(HardClip()))
    assert callback.metrics["restraint/num_changed"] > 0
    for matrix in callback.matrices.values():
        assert matrix.weight().shape == (matrix.original().shape)
        assert sigma_max(matrix.delta()) < (1 + 1e-9) * sigma_max(matrix.original())
    resumed = run(4, SpectralRestraint(HardClip()), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


# -- what the Hugging Face Trainer logs -------------------------------------------------------------------------------
class Reporter(TrainerCallback):
    """Keeps, as a reporter does, what it is given at the time it is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, copy.deepcopy(logs)))


def test_figures_are_in_the_history_and_reach_every_reporter(tiny, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12) + 20]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        logging_steps=1,
        learning_rate=30.0,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    reporter, prune = Reporter(), PRUNE(3.0, parameters="*.mlp.c_proj.weight")
    figures = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            figures.append(dict(prune.metrics))

    callbacks = [reporter, RestraintCallback(prune), Watch()]
    trainer = Trainer(tiny("gpt2").model.requires_grad_(True), arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    assert figures[-1]["restraint/num_above"] > 0
    history = [{k: v for k, v in row.items() if k.startswith("restraint/")} for row in trainer.state.log_history]
    given = [{k: v for k, v in logs.items() if k.startswith("restraint/")} for _, logs in reporter.logs]
    assert history[:3] == given[:3] == figures
    assert len({type(callback) for callback in trainer.callback_handler.callbacks}) == len(
        trainer.callback_handler.callbacks
    )
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names[0] == "RestraintCallback"
    trainer.train()
    assert [type(callback).__name__ for callback in trainer.callback_handler.callbacks] == names


def test_two_restraints_keep_their_order(tiny, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24).view(2, 12) + 20]
    pair = [RestraintCallback(PRUNE(3.0, parameters=f"*.{i}.mlp.c_proj.weight")) for i in (0, 1)]
    trainer = Trainer(tiny("gpt2").model.requires_grad_(True), arguments, train_dataset=rows, callbacks=pair)
    for _ in range(2):
        trainer.train()
        assert trainer.callback_handler.callbacks[:2] == pair
        assert all(callback.restraint.matrices for callback in pair)


def test_two_restraints_of_the_same_matrix_under_the_hugging_face_trainer(tiny, tmp_path):
    """A step of RECT is what the optimizer did, whatever PRUNE took away before; each has its own checkpoint."""
    name = "transformer.h.1.mlp.c_proj.weight"
    original = tiny("gpt2").model.get_parameter(name).detach().T.clone()
    expected, wrong = [original], []

    class ByHand(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            step = -args.learning_rate * model.get_parameter(name).grad.T
            kept = step * by_definition(step, expected[-1], 0.4)
            change = dense_prune(expected[-1] + kept - original, 20.0, sigma_max(original))
            expected.append(original + change)

        def on_step_end(self, args, state, control, model, **kwargs):
            wrong.append(
                float((model.get_parameter(name).detach().T - expected[-1]).norm() / (expected[-1] - original).norm())
            )

    def restraints():
        return [RECT(0.4, parameters=name), PRUNE(20.0, parameters=name)]

    straight = train(tiny("gpt2").model, tmp_path, pair := restraints(), steps=4, save=2, watch=[ByHand()])
    assert pair[1].metrics["restraint/num_changed"] > 0
    assert len(wrong) == 4
    assert max(wrong) < 1e-9
    resumed = train(tiny("gpt2").model, tmp_path, restraints(), steps=4, resume=tmp_path / "checkpoint-2")
    # The optimizer's own rounding: Trainer and checkpoint sum in the same order, but not in the same memory.
    assert torch.allclose(resumed.get_parameter(name), straight.get_parameter(name), rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="list PRUNE before SubspaceFilter"):
        train(tiny("gpt2").model, tmp_path, [SubspaceFilter(parameters=name), PRUNE(parameters=name)], steps=1)
