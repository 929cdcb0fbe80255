"""Blocks with a backward pass written by hand, against the model's own."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, alike
from test_values import REQUESTS, rows_of

from prune_lightning.methods.value_problem import Layout, ShiftSite, UpperForward
from prune_lightning.models.cached_forward import LEAN
from prune_lightning.models.lean_blocks import is_lean

LEAN_FAMILIES = {"llama", "mistral", "qwen2"}


def logits_and_gradient(forward, layout, shift, run):
    shift = shift.clone().requires_grad_()
    hidden = forward.hidden.clone()
    hidden = torch.cat([hidden[:, :1] + shift[layout.owner][:, None], hidden[:, 1:]], dim=1)
    logits = run(hidden, layout.read_rows, layout.read_offsets)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), [shift])
    return logits.detach(), gradient


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", sorted(LEAN_FAMILIES))
def test_logits_and_gradients_are_those_of_the_models_own_blocks(family, layer, tiny):
    model = tiny(family)
    layout = Layout(model, rows_of(model))
    forward = UpperForward(model, ShiftSite(layer, "block"), layout).forward
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(len(REQUESTS), forward.hidden.shape[-1], generator=generator, dtype=torch.float64)
    for keep in ([0, 1, 2, 3, 4], [1, 4]):  # the longest rows are left out
        if len(keep) < len(REQUESTS):
            forward.select(torch.nonzero(torch.isin(layout.owner, torch.tensor(keep)))[:, 0])
            layout, shift = Layout(model, [rows_of(model)[i] for i in keep]), shift[keep]
        lean = logits_and_gradient(forward, layout, shift, forward.logits_at)
        own = logits_and_gradient(forward, layout, shift, forward._rerun)
        for ours, theirs in zip(lean, own, strict=True):
            assert alike(ours, theirs)  # the norms run in fp32 in both, in another order of operations
        assert forward._lean is not None
        assert forward._lean[2] is not None
        assert model.fast_path.holds(LEAN, lambda: False)  # two computations, not one


@pytest.mark.parametrize("family", FAMILIES)
def test_which_models_have_lean_blocks(family, tiny):
    model = tiny(family)
    layout = Layout(model, rows_of(model))
    forward = UpperForward(model, ShiftSite(1, "block"), layout).forward
    forward.logits_at(forward.hidden, layout.read_rows, layout.read_offsets)
    assert model.fast_path.holds(LEAN, lambda: False) == (family in LEAN_FAMILIES)


def test_a_hooked_block_runs_as_it_is(tiny):
    block = tiny("llama").block(1)
    assert is_lean(block)
    handle = block.mlp.register_forward_hook(lambda *args: None)
    assert not is_lean(block)
    handle.remove()
    assert is_lean(block)
    block.self_attn.q_proj = torch.nn.Identity()
    assert not is_lean(block)
