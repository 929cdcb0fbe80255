"""Layouts of a forward pass, and modules that see a part of it: the same numbers, less work."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from torch import nn

from prune_lightning.models.hooks import capture, few_rows, only_at
from prune_lightning.models.packing import pack

# Two pairs that begin alike, one sequence that is the beginning of another, one on its own.
SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11], [5, 6, 7], [12, 13, 14, 15], [12, 13, 14, 16, 17], [20]]


def alone(model, sequence: list[int]) -> torch.Tensor:
    """What leaves the middle block when a sequence runs by itself."""
    ids = torch.tensor([sequence])
    with torch.no_grad(), capture(outputs=[model.block(1)]) as seen:
        model(ids, torch.ones_like(ids))
    return seen.outputs[0][0]


@pytest.mark.parametrize("takes_trees", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_found_where_they_went(family, takes_trees, tiny, monkeypatch):
    model = tiny(family)
    if not takes_trees:
        monkeypatch.setattr(type(model), "tree_depth", 0)
    assert not takes_trees or model.tree_depth
    packed = pack(model, *model.tokens.pad(SEQUENCES, model.device))
    assert ("position_ids" in packed.inputs) == takes_trees
    assert packed.inputs["input_ids"].shape[0] == (1 if takes_trees else len(SEQUENCES))
    with torch.no_grad(), capture(outputs=[model.block(1)]) as seen:
        model(**packed.inputs)
    for index, sequence in enumerate(SEQUENCES):
        positions = torch.arange(len(sequence))
        row, place = packed.find(torch.full_like(positions, index), positions)
        assert packed.inputs["input_ids"][row, place].tolist() == sequence
        assert torch.allclose(seen.outputs[0][row, place], alone(model, sequence), rtol=1e-5, atol=1e-6)


def test_trees_are_left_alone_where_nothing_is_shared(tiny):
    model = tiny("gpt2")
    packed = pack(model, *model.tokens.pad([[1, 2, 3], [4, 5, 6]], model.device))
    assert packed.inputs["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("rows", [1, 13, 32, 33])
def test_few_rows_give_what_linear_gives(rows):
    head = nn.Linear(16, 300, bias=False, dtype=torch.float64)
    hidden = torch.randn(rows, 1, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, 1, 300, dtype=torch.float64)
    expected = head(hidden)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), hidden)
    with few_rows(head):
        found = head(hidden)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad((found * weight).sum(), hidden)[0], gradient, rtol=1e-12)
    assert "forward" not in vars(head)


def test_few_rows_leave_other_heads_alone():
    for head in (nn.Linear(4, 9), nn.Sequential(nn.Linear(4, 9, bias=False))):
        with few_rows(head):
            assert "forward" not in vars(head)


def test_a_module_sees_only_some_tokens_and_gradients_reach_them():
    mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)).double()
    hidden = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([0, 5, 6, 11])
    chosen = torch.zeros(12, 1, dtype=torch.float64).index_fill(0, places, 1).view(3, 4, 1)
    expected = mlp(hidden) * chosen
    (gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
    seen = []
    mlp[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0].flatten(0, -2))))
    with only_at(mlp, places):
        found = mlp(hidden)
    assert seen == [4]
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(found.square().sum(), hidden)[0], gradient, rtol=1e-12)
    assert "forward" not in vars(mlp)


def test_a_patched_forward_is_used_and_restored():
    head = nn.Linear(4, 9, bias=False)
    own = head.forward = lambda hidden: hidden * 2
    with few_rows(head):
        assert head.forward is own
    with only_at(head, torch.tensor([1])):
        assert head(torch.ones(1, 2, 4)).tolist() == [[[0.0] * 4, [2.0] * 4]]
    assert head.forward is own
