"""What an editing module keeps follows its parameters to another device."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import quiet_trainer
from torch import nn

from prune_lightning.bundled.corpus import BundledCorpus
from prune_lightning.callbacks import PRUNE
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.devices import to_device
from prune_lightning.methods.alphaedit import AlphaEdit
from prune_lightning.methods.fine_tuning import FineTuning
from prune_lightning.methods.grace import GRACE
from prune_lightning.methods.lora import LoRA
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.memoir import MEMOIR
from prune_lightning.methods.mend import MEND
from prune_lightning.methods.rome import ROME
from prune_lightning.methods.serac import SERAC
from prune_lightning.methods.ultraedit import UltraEdit
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.statistics import SecondMoments

OURS = ("prune_lightning",)


def reachable(holder):
    """Yield the path and every tensor that can be reached from an object, through whatever of ours holds it."""
    seen, todo = set(), [("module", holder)]
    while todo:
        path, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, dict):
            todo += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            todo += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, nn.Module) or type(value).__module__.startswith(OURS):
            todo += [(f"{path}.{name}", item) for name, item in vars(value).items()]
        elif isinstance(value, types.MethodType):
            todo.append((f"{path}.__self__", value.__self__))


def moments():
    return SecondMoments(BundledCorpus(60, {"facts": 0.5, "text": 0.5}), ridge=1e-2)


LOCATE = {"value": ValueOptions(steps=2), "contexts": ContextOptions(lengths=[[5, 1]])}
METHODS = {
    "rome": lambda model: ROME(language_model=model, layers=[0], second_moments=moments(), **LOCATE),
    "memit": lambda model: MEMIT(
        language_model=model,
        layers=[0, 1],
        second_moments=moments(),
        ridge=50.0,
        accumulate_past_keys=True,
        **LOCATE,
    ),
    "alphaedit": lambda model: AlphaEdit(language_model=model, layers=[0, 1], second_moments=moments(), **LOCATE),
    "ft": lambda model: FineTuning(language_model=model, layers=[0], loss="prompt_last", steps=1),
    "lora": lambda model: LoRA(language_model=model, layers=[0], target_modules=["c_attn"], steps=1, keep=True),
    "mend": lambda model: MEND(language_model=model, layers=[0], hypernetwork=None),
    "grace": lambda model: GRACE(language_model=model, layers=[0], steps=1),
    "serac": lambda model: SERAC(language_model=model, layers=[0], path=None),
    "memoir": lambda model: MEMOIR(language_model=model, layers=[0], steps=1, contexts=ContextOptions(fixed=[])),
    "ultraedit": lambda model: UltraEdit(model, layers=[0], rate=3e-4),
}


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_a_module_keeps_moves_with_it(name, bundled):
    module = METHODS[name](bundled)
    quiet_trainer(PRUNE(1.2)).fit(module, datamodule=BundledWorld(num_edits=2))
    module.trainer = None
    before = {path: (value.dtype, value.shape) for path, value in reachable(module)}
    held = [path for path in before if "run" in path]
    assert not module.in_weights or any("master" in path for path in held)
    assert any("_original" in path or "keys" in path or "masks" in path for path in held)
    module.to("meta")
    after = dict(reachable(module))
    assert {path: value.device.type for path, value in after.items() if value.device.type != "meta"} == {}
    assert {path: (after[path].dtype, after[path].shape) for path in before} == before
    for matrix in module.edited_matrices().values():
        assert any(matrix.parameter is parameter for parameter in module.parameters())


def test_dtypes_of_what_is_kept_do_not_follow_the_module(bundled):
    """A module in half precision still accumulates in single precision."""
    module = METHODS["ft"](bundled)
    (matrix,) = module.edited_matrices().values()
    original = matrix.original()
    module.half()
    assert matrix.parameter.dtype == torch.float16
    assert matrix.change.master.dtype == torch.float32
    assert matrix.original() is not None
    torch.testing.assert_close(matrix.original(), original, rtol=0, atol=0)


def test_what_holds_nothing_that_moves_stays_the_same_object():
    held = {"a": [torch.zeros(2), (1, "x")], "b": nn.Linear(1, 1)}
    assert to_device(held, torch.device("cpu")) is held
    moved = to_device(held, torch.device("meta"))
    assert moved["a"][0].device.type == "meta"
    assert moved["b"] is held["b"]
