"""Greedy and sampled continuations with shared beginnings, against the model's own ``generate``."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES

from prune_lightning.evaluation import decoding
from prune_lightning.evaluation.decoding import PREFILLED, TopK, decode
from prune_lightning.models import prefilled
from prune_lightning.models.prefilled import Prefilled, prefills

BEGINNING = [5, 9, 2, 7, 11, 3]
PROMPTS = [[*BEGINNING, 4, 8], [*BEGINNING, 13], [1, 2, 3], [*BEGINNING, 4, 1, 1, 6, 12], [2]]


def both(model, limits, sampling=None, **options):
    """Return the continuations with shared beginnings, and those of each prompt alone, which needs no padding."""
    model.fast_path._held[PREFILLED] = True
    ours = decode(model, PROMPTS, limits, sampling=sampling, **options)
    model.fast_path._held[PREFILLED] = False
    theirs = []
    for i, prompt in enumerate(PROMPTS):
        draws = TopK(sampling.k, [sampling.seeds[i]]) if sampling else None
        theirs += decode(model, [prompt], [limits[i]], sampling=draws, **options)
    return ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_as_generate_does(family, tiny, monkeypatch):
    model = tiny(family)
    assert prefills(model)
    monkeypatch.setattr(prefilled, "TOKENS", 20)  # several passes over the prompts
    ours, theirs = both(model, limits=[6, 3, 1, 6, 4])
    assert ours == theirs
    assert [len(one.ids) for one in ours] == [6, 3, 1, 6, 4]


def test_stops_and_draws_are_those_of_generate(tiny):
    model = tiny("llama")
    for options in ({"sampling": TopK(3, [1, 2, 3, 4, 5])}, {"stops": ["a", "e"]}):
        ours, theirs = both(model, limits=[8] * 5, **options)
        assert ours == theirs
    assert len({len(one.ids) for one in ours}) > 1  # rows left the batch on the way


def test_logits_equal_those_of_whole_passes(tiny):
    model = tiny("qwen2")
    found = Prefilled(model, PROMPTS)
    ends = [found.logits]
    found.append(torch.tensor([1, 2, 3, 4, 5]))
    found.select(torch.tensor([0, 3]))
    ends.append(found.append(torch.tensor([6, 7])))
    for rows, new, end in (([0, 1, 2, 3, 4], [[]] * 5, ends[0]), ([0, 3], [[1, 6], [4, 7]], ends[1])):
        for row, added, logits in zip(rows, new, end, strict=True):
            ids = torch.tensor([[*PROMPTS[row], *added]])
            whole = model(ids, torch.ones_like(ids))[0, -1]
            # Rotations and norms run in fp32 at other places of a tensor: tens of roundings.
            assert float((logits - whole).norm()) < 100 * torch.finfo(torch.float32).eps * float(whole.norm())


def test_shared_beginnings_run_once(tiny):
    model = tiny("llama")
    counted = []
    handle = model.block(0).register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[:2].numel()))
    Prefilled(model, [[*BEGINNING * 4, i] for i in range(20)])
    handle.remove()
    assert max(counted) <= 4 * len(BEGINNING) + 20


def test_a_model_without_such_a_cache_generates_itself(tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(Prefilled, "append", lambda self, tokens: self.logits)
    assert not prefills(model)
    monkeypatch.setattr(decoding, "_continued", None)
    assert len(decode(model, PROMPTS, [2] * 5)) == 5
