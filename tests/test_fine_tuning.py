"""Fine-tuning against a plain statement of it: autograd on the live parameter, the whole model, `torch.optim.Adam`."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, quiet_trainer, write
from torch.nn import functional

from prune_lightning.callbacks import PRUNE, RECT, SpectrumMonitor
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.methods.fine_tuning import FineTuning
from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.methods.tuning_problem import UpperWeights, WholeWeights
from prune_lightning.models.cached_forward import LEAN
from prune_lightning.models.family import stores_transposed
from prune_lightning.spectral import AccumulatedChange, sigma_max
from prune_lightning.types import DenseUpdate, EditBatch, EditRequest, LowRankUpdate

# Prompts and targets of all lengths.
REQUESTS = [
    EditRequest(0, "Lisbon", "Lisbon is the capital of", "Spain"),
    EditRequest(1, "the old Danube", "For as long as anybody here remembers, the old Danube", "flows into a lake"),
    EditRequest(2, "Bo", "Bo is", "no"),
]


def plain_loss(model, request: EditRequest, loss: str, end_of_text: bool = False) -> torch.Tensor:
    """The loss of one request, alone and unpadded, from the logits of the whole model."""
    prompt = model.tokens.encode(request.prompt)
    whole = model.tokens.encode(f"{request.prompt} {request.target_new}")
    whole += [model.tokens.tokenizer.eos_token_id] * end_of_text
    target = torch.tensor(whole[len(prompt) :])
    if loss == "target":
        return functional.cross_entropy(model.model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1], target)
    return functional.cross_entropy(model.model(torch.tensor([prompt])).logits[0, -1].expand(len(target), -1), target)


def plain_tuning(
    model, requests, layers, loss, steps, batch_size, skip, stop, epsilon=None, end_of_text=False, seed=None
) -> list[torch.Tensor]:
    """What ROME's and EasyEdit's loops do, one request at a time; returns the changes as the layers store them.

    With a seed, LocFT's: another order in each pass.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    weights = [model.rewrite_module(layer).weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=5e-3)
    for _ in range(steps):
        seen = []
        if seed is not None:
            order = torch.randperm(len(REQUESTS), generator=generator).tolist()
            requests = [REQUESTS[i] for i in order]
        for i in range(0, len(requests), batch_size):
            optimizer.zero_grad()
            losses = [plain_loss(model, request, loss, end_of_text) for request in requests[i : i + batch_size]]
            mean = sum(losses) / len(losses)
            seen += [float(each.detach()) for each in losses]
            if float(mean.detach()) >= skip:
                mean.backward()
                optimizer.step()
                if epsilon:
                    for weight, old in zip(weights, before, strict=True):
                        weight.data = torch.minimum(torch.maximum(weight.data, old - epsilon), old + epsilon)
        if sum(seen) / len(seen) < stop:
            break
    changes = [weight.detach() - old for weight, old in zip(weights, before, strict=True)]
    for weight, old in zip(weights, before, strict=True):
        weight.requires_grad_(False).copy_(old)
    return changes


def tuning(model, layers=(1,), loss="target", **kwargs) -> FineTuning:
    return FineTuning(language_model=model, layers=list(layers), loss=loss, **({"learning_rate": 5e-3} | kwargs))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def exactness(family: str) -> float:
    """Return the rounding that a family allows, whatever the processor.

    ``transformers`` computes the attention of gptj and the RMS norms in fp32 whatever the model's dtype: ten roundings
    of that. gemma2 has four such norms in each block, one after another.
    """
    fp32 = 10 * torch.finfo(torch.float32).eps
    return {"gpt2": 1e-8, "gpt_neox": 1e-8, "gemma2": 100 * fp32}.get(family, fp32)


@pytest.mark.parametrize("loss", ["target", "prompt_last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_match_their_definition(family, loss, tiny):
    model = tiny(family)
    batch = TargetBatch(model, REQUESTS, loss)
    losses = batch.losses(model.logits_at(batch.ids, batch.mask, batch.rows, batch.positions))
    assert losses.tolist() == pytest.approx([float(plain_loss(model, r, loss)) for r in REQUESTS], rel=1e-6)
    if loss == "prompt_last":
        assert len(batch.rows) == len(REQUESTS), "one place per prompt, however many tokens its target has"


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize(
    ("loss", "further"),
    [
        ("target", {}),
        ("prompt_last", {}),
        ("target", {"end_of_text": True}),
        ("target", {"seed": 1}),
        ("target", {"end_of_text": True, "seed": 3}),
    ],
)
def test_training_is_the_published_loop(loss, further, layers, tiny):
    model = tiny("gpt2")
    setting = {"steps": 4, "batch_size": 2, **further}
    plain = plain_tuning(model, REQUESTS, layers, loss, skip=0.0, stop=0.0, **setting)
    module = tuning(model, layers, loss, skip_loss=0.0, stop_loss=0.0, **setting)
    updates, details = module.compute_update(REQUESTS)
    assert list(updates) == [model.rewrite_name(layer) for layer in layers]
    for update, change in zip(updates.values(), plain, strict=True):
        assert relative(update.dense(), change.T) < 1e-8
    assert [detail["steps"] for detail in details] == [4, 4, 4]
    if "seed" in further:
        inert = plain_tuning(model, REQUESTS, layers, loss, skip=0.0, stop=0.0, **(setting | {"seed": None}))
        assert relative(inert[0], plain[0]) > 1e-2, "the order makes a difference"
    else:
        first = float(plain_loss(model, REQUESTS[0], loss, further.get("end_of_text", False)))
        assert details[0]["losses"][0] == pytest.approx(first, rel=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_below_the_threshold_are_skipped_and_low_passes_end_the_edit(family, tiny):
    model = tiny(family)
    free = tuning(model, steps=8, skip_loss=0.0, stop_loss=0.0).compute_update(REQUESTS)[1]
    skip = 1.001 * min(detail["losses"][3] for detail in free)
    stop = sum(detail["losses"][4] for detail in free) / 3
    plain = plain_tuning(model, REQUESTS, [1], "target", 20, 1, skip, stop)[0]
    updates, details = tuning(model, steps=20, skip_loss=skip, stop_loss=stop).compute_update(REQUESTS)
    assert relative(next(iter(updates.values())).dense(), plain.T if family == "gpt2" else plain) < exactness(family)
    steps = [detail["steps"] for detail in details]
    assert min(steps) < len(details[0]["losses"]) < 20, "one request has to be skipped, and the edit to end early"


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("loss", ["target", "prompt_last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_path_equals_the_plain_one(family, loss, layers, tiny, recwarn):
    model, setting = tiny(family), {"steps": 4, "batch_size": 2, "stop_loss": 0.0}
    fast = tuning(model, layers, loss, **setting).compute_update(REQUESTS)
    plain = tuning(model, layers, loss, fast=False, **setting).compute_update(REQUESTS)
    assert not [w for w in recwarn if "fast path" in str(w.message)]
    for name in plain[0]:
        assert relative(fast[0][name].dense(), plain[0][name].dense()) < exactness(family)
    for one, other in zip(fast[1], plain[1], strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=exactness(family))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_give_equal_logits_for_any_weight_at_any_layer(family, layer, tiny):
    model = tiny(family)
    batch = TargetBatch(model, REQUESTS, "target")
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = WholeWeights(model, batch).logits({layer: weight})
    assert torch.allclose(UpperWeights(model, layer, batch).logits({layer: weight}), whole, rtol=1e-5, atol=1e-5)
    module = model.rewrite_module(layer)
    with torch.no_grad():
        module.weight.copy_(weight.T if stores_transposed(module) else weight)
    live = model.logits_at(batch.ids, batch.mask, batch.rows, batch.positions)
    assert torch.allclose(whole, live, rtol=1e-10, atol=1e-10)


def test_lean_blocks_do_not_run_while_a_weight_above_is_replaced(tiny, recwarn):
    model, setting = tiny("llama"), {"steps": 3, "stop_loss": 0.0}
    tuning(model, [1], **setting).compute_update(REQUESTS)
    assert model.fast_path.holds(LEAN, lambda: False)
    fast = tuning(model, [0, 2], **setting).compute_update(REQUESTS)[0]
    plain = tuning(model, [0, 2], fast=False, **setting).compute_update(REQUESTS)[0]
    assert all(relative(fast[name].dense(), plain[name].dense()) < exactness("llama") for name in plain)
    assert not [w for w in recwarn if "fast path" in str(w.message)]


def test_a_model_that_the_fast_path_does_not_fit_takes_the_plain_one_and_says_so(tiny, monkeypatch):
    model = tiny("gpt2")
    expected = tuning(model, steps=3, fast=False).compute_update(REQUESTS)[0]
    logits = UpperWeights.logits
    monkeypatch.setattr(UpperWeights, "logits", lambda self, weights: 1.01 * logits(self, weights))
    module = tuning(model, steps=3)
    with pytest.warns(UserWarning, match="the whole model runs at every step"):
        updates = module.compute_update(REQUESTS)[0]
    assert all(torch.equal(updates[name].dense(), expected[name].dense()) for name in expected)


@pytest.mark.parametrize("loss", ["target", "prompt_last"])
def test_constraint_is_the_published_clamp(loss, tiny):
    model = tiny("gpt2")
    plain = plain_tuning(model, REQUESTS, [1], loss, 5, 1, 0.0, 0.0, epsilon=7e-3)[0]
    module = tuning(model, loss=loss, steps=5, epsilon=7e-3, skip_loss=0.0, stop_loss=0.0)
    change = next(iter(module.compute_update(REQUESTS)[0].values())).dense()
    assert relative(change, plain.T) < 1e-8
    assert float(change.abs().max()) == pytest.approx(7e-3, rel=1e-12)


@pytest.mark.parametrize("anchor", ["current", "original"])
def test_constraint_holds_against_its_anchor_over_a_stream(anchor, tiny):
    model, epsilon = tiny("llama"), 7e-3
    original = model.rewrite_module(1).weight.detach().clone()
    module = tuning(model, steps=5, epsilon=epsilon, anchor=anchor)
    before, drifts = original, []
    for request in REQUESTS:
        write(module, [request], module.compute_update([request])[0])
        weight = model.rewrite_module(1).weight.detach().clone()
        step, drift = float((weight - before).abs().max()), float((weight - original).abs().max())
        assert (step if anchor == "current" else drift) == pytest.approx(epsilon, rel=1e-9)
        before = weight
        drifts.append(drift)
    assert (drifts[-1] > 1.5 * epsilon) == (anchor == "current")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_the_change_in_single_precision(dtype, tiny):
    model = tiny("llama", dtype)
    module = tuning(model, steps=8, learning_rate=1e-4)
    name, original = model.rewrite_name(1), model.rewrite_module(1).weight.detach().clone()
    total = torch.zeros(32, 32)
    for _ in range(2):  # steps far below what 16 bits resolve add up
        updates, details = module.compute_update(REQUESTS)
        assert updates[name].dense().dtype == torch.float32
        total += updates[name].dense()
        write(module, REQUESTS, updates)
        assert all(detail["losses"][-1] < detail["losses"][0] for detail in details)
    assert torch.allclose(module.edited_matrices()[name].delta(), total, atol=1e-7)
    assert torch.equal(model.rewrite_module(1).weight, (original.float() + total).to(dtype))
    assert float(total.abs().max()) < 16 * 8e-3 * 0.2


def test_nothing_is_left_on_the_model(bundled):
    before = {name: dict(module.__dict__) for name, module in bundled.model.named_modules()}
    weights = {name: p.detach().clone() for name, p in bundled.model.named_parameters()}
    tuning(bundled, [0, 1], steps=2).compute_update(REQUESTS)
    assert {name: dict(module.__dict__) for name, module in bundled.model.named_modules()} == before
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in bundled.model.named_parameters())


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential", "sequential_batched"])
@pytest.mark.parametrize("restraint", ["prune", "rect"])
def test_restraints_and_monitor_under_every_protocol(restraint, protocol, bundled):
    module = tuning(bundled, [0], steps=5, learning_rate=2e-2)
    ((_, matrix),) = module.edited_matrices().items()
    raw, live = [], []
    compute = module.compute_update

    def watched(requests):
        updates, details = compute(requests)
        raw.append(next(iter(updates.values())).dense().clone())
        return updates, details

    module.compute_update = watched

    class Look(PRUNE):
        def restrain(self, matrix):
            super().restrain(matrix)
            live.append(matrix.weight() - matrix.original())

    callback = Look(1.5) if restraint == "prune" else RECT(0.2)
    stream = BundledWorld(num_edits=4, protocol=protocol, batch_size=2 if "batch" in protocol else 1)
    quiet_trainer(callback, SpectrumMonitor(every_n=2, draw=False)).fit(module, datamodule=stream)
    assert module.num_requests == 4
    assert len(raw) == (2 if "batch" in protocol else 4)
    if protocol in ("single", "batch"):
        assert torch.equal(matrix.weight(), matrix.original())
    if restraint == "prune":
        summed = torch.zeros_like(raw[0])
        for update, restrained in zip(raw, live, strict=True):
            summed = update if protocol in ("single", "batch") else summed + update
            reference = sigma_max(matrix.original())
            u, sigma, v = torch.linalg.svd(summed.double(), full_matrices=False)
            assert sigma[0] > reference, "the restraint has to have work to do"
            allowed = torch.where(
                sigma > reference, (sigma / reference).log() / torch.tensor(1.5).log() + reference, sigma
            )
            assert relative(restrained.double(), u @ torch.diag(allowed) @ v) < 1e-4
    elif "sequential" in protocol:
        kept = (matrix.delta() != 0).float().mean()
        assert 0.15 < float(kept) < 0.2 * len(raw)


def test_dense_updates_end_the_factored_form_and_low_rank_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    low = LowRankUpdate(torch.randn(40, 2, generator=generator), torch.randn(30, 2, generator=generator))
    dense = DenseUpdate(torch.randn(40, 30, generator=generator))
    change = AccumulatedChange(torch.zeros(40, 30))
    change.add(low)
    assert change.factored() is not None
    change.add(dense)
    assert change.factored() is None
    change.add(low)
    total = 2 * low.dense() + dense.matrix
    assert torch.allclose(change.master, total, atol=1e-5)
    assert torch.allclose(change.singular_values(), torch.linalg.svdvals(total.double()), rtol=1e-5)
    assert dense.norm() == pytest.approx(float(torch.linalg.svdvals(dense.matrix).square().sum().sqrt()))


def test_a_loss_that_is_not_finite_moves_nothing(tiny):
    model = tiny("gpt2")
    with torch.no_grad():
        model.rewrite_module(2).weight[0, 0] = float("nan")
    module = tuning(model, steps=3)
    quiet_trainer().fit(module, torch.utils.data.DataLoader([EditBatch(tuple(REQUESTS[:1]))], batch_size=None))
    assert module.run.last_report is not None
    assert module.run.last_report.details[0]["steps"] == 0
    assert module.run.last_report.update_norm == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss": "targets"}, "method.loss"),
        ({"anchor": "first"}, "method.anchor"),
        ({"anchor": "original"}, "needs method.epsilon"),
        ({"epsilon": 0.0}, "method.epsilon"),
        ({"steps": 0}, "method.steps"),
    ],
)
def test_bad_options_are_reported(option, message, tiny):
    with pytest.raises(UserError, match=message):
        tuning(tiny("gpt2"), **option)
