"""Logits as a function of a module's output: only what it reaches runs, and gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, alike
from test_fine_tuning import REQUESTS

from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.methods.tuning_problem import UpperOutput, logits_of_output
from prune_lightning.models.cached_forward import LEAN
from prune_lightning.models.hooks import capture

KIND = "the test"


def both_ways(model, host, layer, start=None):
    """Return logits and the gradient of a random combination of them, by the fast path and by the plain one."""
    batch = TargetBatch(model, REQUESTS, "target")
    lowest = torch.zeros(len(REQUESTS), dtype=torch.long) if start is None else start
    after = torch.arange(batch.ids.shape[1]) >= lowest[:, None]
    generator = torch.Generator().manual_seed(0)
    found = []
    with torch.no_grad(), capture(outputs=[host], rows=len(batch.ids)) as seen:
        model(batch.ids, batch.mask)
    shift = torch.randn(seen.outputs[0].shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(batch.rows), model.config.vocab_size, generator=generator, dtype=torch.float64)
    for fast in (True, False):
        forward = logits_of_output(model, host, layer, batch, KIND, fast, start)
        moved = shift.clone().requires_grad_()
        logits = forward(lambda output, moved=moved: output + (moved * after[..., None]).to(output))
        (gradient,) = torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), [moved])
        found.append((logits.detach(), gradient))
    return found


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_change_of_the_output_gives_the_logits_and_gradients_of_the_whole_model(family, layer, tiny, recwarn):
    model = tiny(family)
    fast, plain = both_ways(model, model.rewrite_module(layer), layer)
    assert all(map(alike, fast, plain))
    assert not torch.equal(fast[1], torch.zeros_like(fast[1]))
    assert not [w for w in recwarn if "fast path" in str(w.message)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_from_some_position_on_reruns_the_tokens_from_there(family, tiny, recwarn):
    model = tiny(family)
    pairs = model.tokens.encode_pairs([request.pair() for request in REQUESTS])
    start = torch.tensor([pair.target_start - 1 for pair in pairs])
    fast, plain = both_ways(model, model.rewrite_module(1), 1, start)
    assert all(map(alike, fast, plain))
    assert not [w for w in recwarn if "fast path" in str(w.message)]
    batch = TargetBatch(model, REQUESTS, "target")
    longest = int((batch.mask.sum(1) - start).max())
    assert UpperOutput(model, 1, batch, start)._above.forward.hidden.shape[1] == longest < batch.ids.shape[1]


@pytest.mark.parametrize("name", ["q_proj", "gate_proj"])
def test_another_module_than_the_down_projection_runs_its_block_again(name, tiny):
    model = tiny("llama")
    (path,) = model.modules_named(1, [name])
    fast, plain = both_ways(model, model.model.get_submodule(path), 1)
    assert all(map(alike, fast, plain))


def test_blocks_above_one_trained_output_are_lean(tiny):
    model = tiny("llama")
    both_ways(model, model.rewrite_module(1), 1)
    assert model.fast_path.holds(LEAN, lambda: False)


def test_a_model_that_is_more_than_the_sum_of_its_parts_takes_the_plain_path(tiny, monkeypatch):
    model = tiny("gpt2")
    logits = UpperOutput.logits
    monkeypatch.setattr(UpperOutput, "logits", lambda self, change: 1.01 * logits(self, change))
    with pytest.warns(UserWarning, match="the whole model runs at every step"):
        fast, plain = both_ways(model, model.rewrite_module(1), 1)
    assert all(map(torch.equal, fast, plain))
