"""MEMOIR against the public code, and its training in the space of the inputs against dense gradient descent."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file
from torch import nn

from prune_lightning.errors import UserError
from prune_lightning.methods.memoir import MEMOIR, mask_size
from prune_lightning.methods.residual_memory import with_columns
from prune_lightning.methods.residual_training import marked, train_columns
from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import capture, edit_output
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditRequest

ORACLES = SHARED / "oracles"
REQUEST = EditRequest(0, "Japan", "The capital of Japan is", "a tall river")


class Published(MEMOIR):
    """The public loss divides by the positions from one before the target's first token to the end of the batch."""

    lengths: list[int]

    def target_batch(self, request):
        batch = super().target_batch(request)
        batch._length = self.lengths[self.run.num_requests] - batch.positions
        return batch


def host_inputs(model, ids, mask):
    """The inputs of the matrix of the memory, from a plain pass."""
    with torch.no_grad(), capture([model.rewrite_module(4)], rows=len(ids)) as seen:
        model(ids, mask)
    return seen.inputs[0]


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
def test_four_edits_match_the_public_code():
    about = json.loads((ORACLES / "oracles_2026.json").read_text())
    setting, requests = about["methods"]["memoir"]["hyper_parameters"], about["requests"]
    theirs = load_file(ORACLES / "oracles_2026.safetensors")
    model = load_language_model(str(ORACLES / "oracle-gpt2"), "float64")
    module = Published(
        language_model=model,
        layers=[4],
        count=setting["top_k"],
        threshold=setting["irr_threshold"],
        steps=setting["n_iter"],
        learning_rate=setting["edit_lr"],
        clip=setting["grad_clip_norm"],
        weight_decay=setting["weight_decay"],
        contexts=ContextOptions(fixed=[each.removesuffix("{}") for each in setting["context_templates"][1:]]),
    )
    module.prepare()
    module.lengths = [theirs[f"memoir.edit{i}.input_ids"].shape[1] for i in range(4)]
    module.side.background = theirs["memoir.background_mean"]
    module.side.permutation = theirs["memoir.permutation"]
    for i, record in enumerate(requests[:4]):
        report = module.edit([EditRequest(i, record["subject"], record["prompt"], record["target_new"])])
        module.run.settle()
        assert report.details[0]["losses"] == pytest.approx(theirs[f"memoir.edit{i}.losses"].tolist(), rel=1e-6)
        if (expected := theirs.get(f"memoir.edit{i}.weight")) is not None:
            assert float((module.side.matrix.T - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(module.side.masks, theirs["memoir.masks"].bool())
    rows = model.tokens.encode_all(setting["queries"])
    ids, mask = model.tokens.pad(rows, model.device)  # all in one batch, which theirs are not
    with torch.no_grad():
        logits = model.logits_at(ids, mask, torch.arange(len(rows)), mask.sum(1) - 1)
    columns = module.side.columns(host_inputs(model, ids, mask), mask.bool())
    shared = marked(columns, module.side.matrix.shape[1]).double() @ module.side.masks.double().T / setting["top_k"]
    assert torch.allclose(shared, theirs["memoir.query.overlap"].double(), rtol=0, atol=1e-6)
    fires = theirs["memoir.query.fires"]
    assert torch.equal(module.side.held.any(1), fires >= 0)
    assert float((logits - theirs["memoir.query.logits"]).norm() / theirs["memoir.query.logits"].norm()) < 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_is_dense_gradient_descent(family, clip, weight_decay, tiny):
    model = tiny(family)
    # Llama's norms run in fp32 whatever the dtype, and the lean blocks add in another order.
    exact = 10 * torch.finfo(torch.float32).eps if family == "llama" else 1e-8
    host, batch = model.rewrite_module(1), TargetBatch(model, [REQUEST], "target", prefixes=("", "The river. "))
    with torch.no_grad(), capture([host], rows=2) as seen:
        model(batch.ids, batch.mask)
    inputs, real, columns = seen.inputs[0], batch.mask.bool(), torch.tensor([1, 4, 30])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(32, 3, dtype=torch.float64, generator=generator) * 0.1
    found = train_columns(
        model,
        host,
        1,
        batch,
        inputs[real][:, columns],
        start,
        steps=4,
        learning_rate=0.5,
        clip=clip,
        weight_decay=weight_decay,
        stop_loss=0.0,
        fast=True,
    )
    matrix = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([matrix], lr=0.5, weight_decay=weight_decay)
    losses = []
    for _ in range(4):
        with edit_output(host, lambda output: output + inputs[..., columns] @ matrix.T, rows=2):
            loss = batch.losses(model.logits_at(batch.ids, batch.mask, batch.rows, batch.positions)).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([matrix], clip)
        optimizer.step()
    change = matrix.detach() - found.kept * start
    assert found.losses == pytest.approx(losses, rel=exact)
    assert float((found.weights.T @ found.inputs - change).norm()) < exact * float(change.norm())
    assert found.norm() == pytest.approx(float(change.norm()), rel=1e-6)
    part = found.factors()
    whole = with_columns(torch.zeros(32, 32, dtype=torch.float64), columns, part, 1.0)
    assert float((whole[:, columns] - change).norm()) < exact * float(change.norm())
    assert int((whole != 0).any(0).sum()) == 3


def test_a_prompt_uses_the_mask_it_shares_most_with(tiny):
    model = tiny("gpt2")
    module = MEMOIR(language_model=model, layers=[1], count=8, threshold=0.75, contexts=ContextOptions(fixed=[]))
    memory = module.side
    memory.masks = torch.zeros(2, 32, dtype=torch.bool)
    memory.masks[0, :8], memory.masks[1, 4:12] = True, True
    queries = torch.tensor([[0, 1, 2, 3, 4, 5, 20, 21], [5, 6, 7, 8, 9, 10, 11, 31], [0, 1, 8, 9, 10, 29, 30, 31]])
    entry, share = memory.closest(queries)
    assert (entry.tolist(), share.tolist()) == ([0, 1, 1], [6 / 8, 7 / 8, 3 / 8])
    assert torch.equal(memory.used(queries), torch.stack([*memory.masks, torch.zeros(32, dtype=torch.bool)]))


def test_a_mask_has_the_published_share_of_the_inputs(tiny):
    assert [mask_size(width) for width in (14336, 1536, 768, 2)] == [4096, 439, 219, 1]
    assert MEMOIR(language_model=tiny("gpt2"), layers=[1]).side.count == 9  # of 32: most prompts do not share it


def test_masks_that_agree_by_chance_are_refused(tiny):
    with pytest.raises(UserError, match=r"method.threshold=0.4 is not above 0.41"):
        MEMOIR(language_model=tiny("gpt2"), layers=[1], count=13)


@pytest.mark.parametrize("wrong", [{"layers": [0, 1]}, {"threshold": 1.5}, {"clip": 0.0}, {"count": 32}, {"count": 0}])
def test_a_wrong_option_is_named(wrong, tiny):
    with pytest.raises(UserError, match=next(iter(wrong))):
        MEMOIR(language_model=tiny("gpt2"), **{"layers": [1], **wrong})
