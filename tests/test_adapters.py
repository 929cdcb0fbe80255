"""A model that carries the user's adapters is refused; nobody's adapters are changed or removed."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny, quiet_trainer
from peft import LoraConfig, LoraModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_conformance import REQUESTS, build

from prune_lightning.errors import UserError
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditBatch

TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}
ADVICE = "merge_and_unload"


def config(family: str, **settings) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, **({"target_modules": TARGETS[family]} | settings))


def wrapped(model, family):
    return get_peft_model(model, config(family))


def inside(model, family):
    return wrapped(model, family).base_model.model


def added(model, family):
    model.add_adapter(config(family))
    return model


def prompt_tuned(model, family):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("attach", [wrapped, inside, added, prompt_tuned])
@pytest.mark.parametrize("family", sorted(TARGETS))
def test_a_model_with_adapters_is_refused(family, attach):
    model = build_tiny(family)
    with pytest.raises(UserError, match=ADVICE):
        LanguageModel(attach(model.model, family), model.tokens.tokenizer)


@pytest.mark.parametrize("method", ["lora", "adalora", "rome", "ft"])
@pytest.mark.parametrize("family", sorted(TARGETS))
def test_adapters_attached_later_are_refused_and_left_alone(family, method):
    model = build_tiny(family)
    module = build(method, model)
    LoraModel(model.model, {"mine": config(family)}, "mine")
    model.model.eval()
    ids = torch.tensor([model.tokens.encode("The capital of Japan is")])
    before = model.model(input_ids=ids).logits
    count = sum(isinstance(m, BaseTunerLayer) for m in model.model.modules())
    assert count
    loader = torch.utils.data.DataLoader([EditBatch(REQUESTS)], batch_size=None)
    with pytest.raises(UserError, match=ADVICE):
        quiet_trainer().fit(module, loader)
    if method in ("lora", "adalora"):
        with pytest.raises(UserError):
            module.compute_update(REQUESTS)
    assert sum(isinstance(m, BaseTunerLayer) for m in model.model.modules()) == count
    assert torch.equal(model.model(input_ids=ids).logits, before)


def test_the_merged_model_is_edited():
    model = build_tiny("llama")
    merged = get_peft_model(model.model, config("llama")).merge_and_unload()
    module = build("lora", LanguageModel(merged, model.tokens.tokenizer))
    assert module.compute_update(REQUESTS)[0]
