"""UltraEdit against the public implementation and against its dense statement."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED, build_tiny, write
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from prune_lightning.errors import UserError
from prune_lightning.methods.standardisation import RunningCovariance, RunningMoments
from prune_lightning.methods.ultraedit import UltraEdit
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import DenseUpdate, EditRequest, LowRankUpdate

ORACLES = SHARED / "oracles"
FACTS = [
    ("Japan", "The capital of Japan is", "an old river"),
    ("Claude Monet", "By profession, Claude Monet was a", "chemist of note"),
    ("Lisbon", "Lisbon is the capital of", "Spain"),
    ("the old Danube", "As anybody here remembers, the old Danube", "flows into a lake"),
    ("the harbour", "Nobody sails into the harbour without", "fear of the night"),
]
REQUESTS = [EditRequest(i, subject, prompt, target) for i, (subject, prompt, target) in enumerate(FACTS)]
NAMES = ["1.gate_proj", "1.down_proj", "2.gate_proj"]


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
def test_two_batches_match_the_public_code():
    facts, tensors = json.loads((ORACLES / "oracles.json").read_text()), load_file(ORACLES / "oracles_2026.safetensors")
    setting = json.loads((ORACLES / "oracles_2026.json").read_text())["methods"]["ultraedit"]["hyper_parameters"]
    requests = [EditRequest(r["case_id"], r["subject"], r["prompt"], r["target_new"]) for r in facts["requests"]]
    module = UltraEdit(
        load_language_model(str(ORACLES / "oracle-gpt2"), "float64"),
        layers=[2],
        modules=[f"{name.split('.')[2]}.{name.split('.')[-1]}" for name in setting["edit_modules"]],
        rate=setting["lr"],
        ridge=setting["ridge"],
        micro_batch=setting["batch_size"],
        inflated_variance=True,
        epsilon=torch.finfo(torch.float64).eps,
    )
    module.prepare()
    assert set(module.edited_matrices()) == {f"{name}.weight" for name in setting["edit_modules"]}
    for batch in (0, 1):
        chunk = requests[4 * batch : 4 * batch + 4]
        pairs = module.language_model.tokens.encode_pairs([request.pair() for request in chunk])
        ordered = sorted(pairs, key=lambda pair: -len(pair.ids))
        for micro, (rows, _, _) in enumerate(module._micro_batches(ordered)):
            for name, found in rows.items():
                for kind, ours in zip(("keys", "gradients"), found, strict=True):
                    theirs = tensors[f"ultraedit.batch{batch}.micro{micro}.{kind}.{name.removesuffix('.weight')}"]
                    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
        updates, _ = module.compute_update(chunk)
        for name, update in updates.items():
            theirs = tensors[f"ultraedit.batch{batch}.shift.{name.removesuffix('.weight')}"].T
            assert float((update.dense() - theirs).norm() / theirs.norm()) < 1e-6
        write(module, chunk, updates)
        for shape in ("512x128", "128x512"):
            keys, gradients = module.moments[shape.replace("x", "_to_")]
            for name, of in (("mean", "mean"), ("var", "squares")):
                ours = torch.cat([getattr(keys, of), getattr(gradients, of)])
                theirs = tensors[f"ultraedit.batch{batch}.normaliser.{shape}.{name}"]
                assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-18)
    for name, matrix in module.edited_matrices().items():
        theirs = tensors[f"ultraedit.batch1.weight.{name.removesuffix('.weight')}"].T
        assert float((matrix.weight() - theirs).norm() / (theirs - matrix.original()).norm()) < 1e-6


def dense_rows(module, requests):
    """Keys and gradients at the target's tokens of one micro-batch, from a plain pass over every row alone."""
    model = module.language_model
    pairs = model.tokens.encode_pairs([request.pair() for request in requests])
    tokens = sum(len(pair.ids) - pair.target_start for pair in pairs)
    rows = {name: [] for name in module.edited_modules()}
    for pair in pairs:
        seen, handles = {}, []
        for name, linear in module.edited_modules().items():

            def hook(_, args, output, name=name, seen=seen):
                seen[name] = args[0].detach(), output.requires_grad_()

            handles.append(linear.register_forward_hook(hook))
        ids = torch.tensor([pair.ids])
        with torch.enable_grad():
            logits = model(ids, torch.ones_like(ids))[0]
            loss = cross_entropy(logits[pair.target_start - 1 : -1], ids[0, pair.target_start :], reduction="sum")
            found = torch.autograd.grad(loss / tokens, [output for _, output in seen.values()])
        for handle in handles:
            handle.remove()
        at = slice(pair.target_start - 1, len(pair.ids) - 1)
        for (name, (inputs, _)), gradient in zip(seen.items(), found, strict=True):
            rows[name].append(torch.cat([inputs[0, at], gradient[0, at]], dim=1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def build(**options):
    settings = {"layers": [1], "modules": NAMES, "rate": 1e-2, "ridge": 0.7, "micro_batch": 2} | options
    return UltraEdit(build_tiny("llama"), **settings)


@pytest.mark.parametrize("budget", [1, 8192])
def test_every_batch_equals_the_dense_statement(budget):
    """The n x n solution with moments over all rows at once, micro-batch by micro-batch, for two batches."""
    module = build(token_budget=budget)
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}
    for chunk in (REQUESTS[:3], REQUESTS[3:]):
        lengths = [len(p.ids) for p in module.language_model.tokens.encode_pairs([r.pair() for r in chunk])]
        ordered = [chunk[i] for i in sorted(range(len(chunk)), key=lambda i: -lengths[i])]
        parts = [dense_rows(module, ordered[i : i + 2]) for i in range(0, len(ordered), 2)]
        now = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, rows in now.items():
            seen.setdefault(module._shapes[name], []).append(rows)
        updates, details = module.compute_update(chunk)
        assert len(details) == len(chunk)
        for name, rows in now.items():
            m, n = module._shapes[name]
            every = torch.cat(seen[m, n])
            standard = (rows - every.mean(0)) / (every.std(0) + torch.finfo(torch.float32).eps)
            values = -1e-2 * standard[:, :n].norm(dim=1, keepdim=True) ** 2 * standard[:, n:]
            keys = rows[:, :n]
            expected = torch.linalg.solve(keys.T @ keys + 0.7 * torch.eye(n), keys.T @ values).T
            # Llama's norms and its rotary embedding compute in fp32, so rows of another padding differ by 1e-7.
            assert torch.allclose(updates[name].dense(), expected, rtol=0, atol=1e-5 * float(expected.norm()))
        write(module, chunk, updates)


def test_moments_are_remembered_only_of_what_was_written():
    module = build()
    start = {name: tensor.clone() for name, tensor in module.memory().items()}
    updates, _ = module.compute_update(REQUESTS[:3])
    assert all(torch.equal(start[name], tensor) for name, tensor in module.memory().items())
    write(module, REQUESTS[:3], updates)
    after = module.memory()
    assert float(after["32_to_32.0.count"]) > 0
    other = build()
    other.load_memory(after)
    for name, matrix in module.edited_matrices().items():
        other.edited_matrices()[name].add(updates[name])
        assert torch.equal(other.edited_matrices()[name].weight(), matrix.weight())
    again, expected = other.compute_update(REQUESTS[3:])[0], module.compute_update(REQUESTS[3:])[0]
    assert all(torch.equal(again[name].dense(), expected[name].dense()) for name in again)
    module.run.restore()
    assert all(torch.equal(start[name], tensor) for name, tensor in module.memory().items())


def test_an_update_is_factored_while_that_is_smaller():
    module = build(micro_batch=10)
    few, many = module.compute_update(REQUESTS[:1])[0], module.compute_update(REQUESTS)[0]
    assert all(isinstance(update, LowRankUpdate) for update in few.values())
    tokens = sum(
        len(p.ids) - p.target_start for p in module.language_model.tokens.encode_pairs([r.pair() for r in REQUESTS])
    )
    assert tokens > 16, "more than half of the matrices' 32 directions"
    assert all(isinstance(update, DenseUpdate) for update in many.values())


def test_a_single_token_changes_nothing_and_says_so():
    module = build(modules=["1.down_proj"])
    request = EditRequest(0, "Japan", "The capital of Japan is", "Rome")
    pairs = module.language_model.tokens.encode_pairs([request.pair()])
    assert len(pairs[0].ids) - pairs[0].target_start == 1
    with pytest.warns(UserWarning, match="a single one"):
        updates, _ = module.compute_update([request])
    assert all(float(update.dense().norm()) == 0 for update in updates.values())


def test_moments_of_blocks_are_those_of_all_rows():
    torch.manual_seed(0)
    rows = torch.randn(60, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    running = RunningCovariance(5, epsilon=0.0)
    for block in rows.split([1, 2, 17, 40]):
        running.update(block)
    assert torch.allclose(running.products / 59, torch.cov(rows.T), rtol=1e-12, atol=0)
    white = running(rows)
    assert torch.allclose(torch.cov(white.T), torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(white.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_too_few_rows_are_standardised_in_place_of_whitened():
    torch.manual_seed(0)
    rows = torch.randn(6, 5, dtype=torch.float64)
    whitening, plain = RunningCovariance(5), RunningMoments(5)
    whitening.update(rows)
    plain.update(rows)
    assert torch.equal(whitening(rows), plain(rows))


def test_small_variances_are_not_blown_up():
    """Eigenvalues below 1e-6 count as that, as in StableEdit."""
    rows = torch.diag(torch.tensor([2.0, 1e-9, 1.0], dtype=torch.float64)).repeat(4, 1)
    running = RunningCovariance(3)
    running.update(rows)
    assert float(running(rows)[:, 1].abs().max()) < 1e-5


def test_inflated_variance_counts_a_block_once_more():
    rows = torch.tensor([[1.0], [3.0], [8.0]], dtype=torch.float64)
    running = RunningMoments(1, inflated=True)
    running.update(rows)
    assert float(running.squares) == pytest.approx(3 * float(rows.var()))


def test_unknown_modules_are_refused():
    with pytest.raises(UserError, match=r"LAYER\.NAME"):
        build(modules=["gate_proj"])
    with pytest.raises(UserError, match=r"no 1\.gate; there are 1\.gate_proj"):
        build(modules=["1.gate"])
    with pytest.raises(UserError, match="positive `rate`"):
        build(rate=0)
