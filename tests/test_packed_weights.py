"""Products with packed weights, against dense products in fp64; and when the copies are made anew."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_lean_blocks import LEAN_FAMILIES, logits_and_gradient
from test_values import REQUESTS, rows_of
from torch import nn

from prune_lightning.methods.value_problem import Layout, ShiftSite, UpperForward
from prune_lightning.models import packed_weights
from prune_lightning.models.cached_forward import LEAN
from prune_lightning.models.packed_weights import Packed, PackedWeights, Plain, packed_bytes, packs

EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def linear(out: int, bias: bool = False, inner: int = 40) -> nn.Linear:
    return nn.Linear(inner, out, bias=bias).requires_grad_(False)


def close(found: torch.Tensor, exact: torch.Tensor, largest: torch.Tensor, terms: int) -> bool:
    """Whether sums of products are exact up to the bound on rounding: ``terms`` eps times the size of the terms."""
    return bool(((found.double() - exact).abs() <= terms * EPS * largest).all())


@pytest.mark.parametrize("kind", [Plain, Packed])
@pytest.mark.parametrize("biases", [(False,), (True,), (False, False), (True, False, True)])
@pytest.mark.parametrize("tokens", [1, 13, 130])
def test_products_are_those_in_double_precision(tokens, biases, kind):
    torch.manual_seed(0)
    modules = [linear(24 + 16 * i, bias) for i, bias in enumerate(biases)]
    hidden, product = torch.randn(tokens, 40), kind(modules)
    outputs = product.forward(hidden)
    for module, output in zip(modules, outputs, strict=True):
        weight, bias = module.weight.double(), 0.0 if module.bias is None else module.bias.double()
        exact = hidden.double() @ weight.T + bias
        sizes = hidden.double().abs() @ weight.abs().T + abs(bias)
        assert close(output, exact, sizes, terms=41)
    gradients = [torch.randn_like(output) for output in outputs]
    pairs = [(g.double(), module.weight.double()) for g, module in zip(gradients, modules, strict=True)]
    exact = sum(g @ weight for g, weight in pairs)
    sizes = sum(g.abs() @ weight.abs() for g, weight in pairs)
    assert close(product.backward(*gradients), exact, sizes, terms=1 + sum(g.shape[1] for g in gradients))


def written_in_place(module):
    with torch.no_grad():
        module.weight.mul_(2)


def loaded(module):
    module.load_state_dict({"weight": 2 * module.weight, "bias": module.bias})


def replaced(module):
    module.weight = nn.Parameter(2 * module.weight, requires_grad=False)


def moved(module):
    module.weight.data = 2 * module.weight


def other_bias(module):
    with torch.no_grad():
        module.bias.add_(1)


@pytest.mark.parametrize("change", [written_in_place, loaded, replaced, moved, other_bias])
def test_copies_follow_the_weights(change):
    torch.manual_seed(0)
    modules, kept, hidden = [linear(8, True), linear(16, True)], PackedWeights(), torch.randn(5, 40)
    first = kept.product(modules)
    assert kept.product(modules) is first, "made once"
    change(modules[1])
    for output, module in zip(kept.product(modules).forward(hidden), modules, strict=True):
        torch.testing.assert_close(output, module(hidden))
    kept.clear()
    assert kept.product(modules) is not first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_a_copy_of_a_model_packs_its_own_weights(copied):
    modules, kept = [linear(8)], PackedWeights()
    first = kept.product(modules)
    assert copied(kept).product(modules) is not first
    assert kept.product(modules) is first


def test_what_is_packed(monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    modules = [linear(8), linear(16)]
    assert packed_bytes(modules) == 2 * 4 * 40 * 24
    assert packs(modules)
    assert not packs([*modules, linear(8).double()])
    assert not packs([*modules, nn.Embedding(3, 4)])
    monkeypatch.setattr(packed_weights, "LARGEST", 2 * 4 * 40 * 24 - 1)
    assert not packs(modules)
    monkeypatch.setattr(packed_weights, "LARGEST", 2**30)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert not packs(modules)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    modules[0].forward = lambda hidden: hidden
    assert not packs(modules)


@pytest.mark.parametrize("family", sorted(LEAN_FAMILIES))
def test_the_value_optimisation_in_fp32_with_packed_weights(family, tiny, monkeypatch):
    """As far from fp64 as the model's own blocks in fp32, and with the weights as they are now."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    exact = tiny(family)
    model = tiny(family)
    model.model.float()
    generator = torch.Generator().manual_seed(0)
    change = 0.1 * torch.randn(model.rewrite_module(1).weight.shape, generator=generator, dtype=torch.float64)
    layout = Layout(model, rows_of(model))
    shift = torch.randn(len(REQUESTS), exact.config.hidden_size, generator=generator, dtype=torch.float64)

    def found(model, path):
        forward = UpperForward(model, ShiftSite(0, "block"), layout).forward
        run = getattr(forward, path)
        found = logits_and_gradient(forward, layout, shift.to(forward.hidden), run)
        if path == "logits_at":
            assert isinstance(forward._lean[2].blocks[0]._down, Packed)
            assert model.fast_path.holds(LEAN, lambda: False)
        return [tensor.double() for tensor in found]

    for _ in range(2):
        truth, own, packed = found(exact, "_rerun"), found(model, "_rerun"), found(model, "logits_at")
        for right, plain, ours in zip(truth, own, packed, strict=True):
            assert 0 < float((ours - right).norm()) < 4 * float((plain - right).norm()) + 4 * EPS * float(right.norm())
        with torch.no_grad():  # as an edit does
            for edited in (exact, model):
                edited.rewrite_module(1).weight.add_(change.to(edited.rewrite_module(1).weight))
