"""What a Trainer asks of an edit stream: served with the right weights, or refused in one line."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from conftest import build_tiny, quiet_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from test_configs import compose
from test_conformance import REQUESTS, build

from prune_lightning.errors import UserError
from prune_lightning.methods.fine_tuning import FineTuning
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.trainer_checks import check_trainer
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.tasks.setup import settle_trainer
from prune_lightning.types import EditBatch

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(model: LanguageModel, method: str = "ft", **arguments):
    module = build(method, model)
    if hasattr(module, "moments"):
        module.moments = {}  # as before `prepare`, which the Trainer calls once the weights are what they will be
    loader = torch.utils.data.DataLoader([EditBatch(REQUESTS[:1]), EditBatch(REQUESTS[1:])], batch_size=None)
    L.Trainer(**(QUIET | {"enable_checkpointing": False} | arguments)).fit(module, loader)
    return module


@pytest.mark.parametrize(("family", "method"), [("gpt2", "ft"), ("gpt2", "rome"), ("llama", "memit")])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", "bfloat16"), ("16-true", "float16"), ("64-true", "float64")]
)
def test_precision_gives_the_weights_of_the_dtype(precision, dtype, family, method):
    by_precision = fit(build_tiny(family, torch.float32), method, max_epochs=1, precision=precision)
    by_dtype = fit(build_tiny(family, torch.float32).to(getattr(torch, dtype)), method, max_epochs=1)
    (got,), (expected,) = by_precision.edited_matrices().values(), by_dtype.edited_matrices().values()
    assert got.weight().dtype == getattr(torch, dtype)
    assert torch.equal(got.weight(), expected.weight())
    assert not torch.equal(expected.weight(), expected.original())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_trainer_without_epochs_edits_the_stream_once(family, tmp_path):
    with pytest.warns(UserWarning, match="run once"):
        module = fit(build_tiny(family), default_root_dir=tmp_path)
    assert module.num_requests == len(REQUESTS)
    once = fit(build_tiny(family), max_epochs=1)
    (got,), (expected,) = module.edited_matrices().values(), once.edited_matrices().values()
    assert torch.equal(got.weight(), expected.weight())


@pytest.mark.parametrize("arguments", [{"max_steps": 1}, {"limit_train_batches": 1}])
def test_a_stream_may_be_cut_short(arguments):
    assert fit(build_tiny("gpt2"), **({"max_epochs": 1} | arguments)).num_requests == 1


REFUSED = [
    {"max_epochs": 3},
    {"max_epochs": 0},
    {"max_epochs": "banana"},
    {"min_epochs": 2},
    {"min_steps": 5},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 1.0},
    {"gradient_clip_algorithm": "norm"},
    {"overfit_batches": 1},
    {"fast_dev_run": True},
    {"limit_train_batches": 0},
    {"precision": "bf16-mixed"},
    {"precision": "16-mixed"},
]


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda a: "=".join(map(str, next(iter(a.items())))))
def test_what_a_stream_cannot_use_is_refused(arguments):
    (name,) = arguments
    model = build_tiny("gpt2")
    weight = model.rewrite_module(1).weight
    before = weight.detach().clone()
    with pytest.raises(UserError, match=rf"^trainer\.{name}=.*") as caught:
        fit(model, **({"max_epochs": 1} | arguments))
    assert "\n" not in str(caught.value)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.devices=0", "devices=0"),
        ("+trainer.precision=banana", "banana"),
        ("trainer.accelerator=abacus", "abacus"),
        ("trainer.max_epochs=banana", "banana"),
        ("+trainer.strategy=fsdp", "strategy|Strategy"),
        ("+trainer.foo=1", "foo"),
        ("+trainer.logger=false", "logger="),
        ("+trainer.accumulate_grad_batches=2", "batch_size"),
    ],
)
def test_arguments_are_refused_before_anything_is_loaded(override, message):
    config = compose(override)
    with pytest.raises(UserError, match=message) as caught:
        settle_trainer(config)
    assert "\n" not in str(caught.value)


def test_precision_is_the_dtype_that_the_run_knows_of():
    config = compose("+trainer.precision=bf16-true")
    settle_trainer(config)
    assert config.model.dtype == "bfloat16"
    config = compose("model.dtype=float64")
    settle_trainer(config)
    assert config.model.dtype == "float64"


def test_sharded_models_are_for_the_methods_that_take_them():
    trainer = quiet_trainer(strategy=ModelParallelStrategy(), devices=2)
    check_trainer(trainer)
    check_trainer(trainer, MEMIT)
    with pytest.raises(UserError, match=r"FineTuning needs the whole model on each device: .*trainer=ddp"):
        check_trainer(trainer, FineTuning)


def test_a_model_that_accelerate_spreads_over_devices_is_refused(tmp_path):
    """The disk is the second device."""
    accelerate = pytest.importorskip("accelerate")
    model = build_tiny("gpt2", torch.float32)
    places = {name: "cpu" for name, _ in model.model.named_children()}
    LanguageModel(accelerate.dispatch_model(model.model, places | {"": "cpu"}), model.tokens.tokenizer)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    places |= {"transformer.drop": "cpu", "transformer.h": "disk"}
    spread = accelerate.dispatch_model(build_tiny("gpt2", torch.float32).model, places, "cpu", offload_dir=tmp_path)
    with pytest.raises(UserError, match=r"device_map over cpu, disk; .*trainer=fsdp2") as caught:
        LanguageModel(spread, model.tokens.tokenizer)
    assert "\n" not in str(caught.value)
