"""LoRA and AdaLoRA against `peft` used as its documentation says."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, quiet_trainer, write
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from test_fine_tuning import REQUESTS, relative
from torch.nn import functional

from prune_lightning.callbacks import PRUNE, RECT, SpectrumMonitor
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.methods.adalora import AdaLoRA
from prune_lightning.methods.cpu_dropout import draw_on_the_cpu
from prune_lightning.methods.lora import LoRA
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditBatch, LowRankUpdate

BOTH = [LoRA, AdaLoRA]
SMALL = {"rank": 2, "alpha": 8, "dropout": 0.0, "steps": 6, "seed": 3}


def adapting(kind, model, **kwargs) -> LoRA:
    return kind(language_model=model, **{**SMALL, **({"initial_rank": 4} if kind is AdaLoRA else {}), **kwargs})


def state(model) -> dict[str, dict]:
    return {name: dict(module.__dict__) for name, module in model.model.named_modules()}


def by_peft(kind, path: str, targets: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Train on the first request with ``peft``'s own model, penalty and merge; return the merged changes."""
    model = load_language_model(path, "float64")
    model.model.loss_function = lambda logits, labels, **_: functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    transposed = {name: stores_transposed(model.model.get_submodule(name)) for name in targets}
    before = {name: model.model.get_submodule(name).weight.detach().clone() for name in targets}
    # Without the task, peft's model would go past AdaLoRA's forward, where the penalty is added.
    shared = {"task_type": "CAUSAL_LM", "target_modules": targets, "lora_alpha": SMALL["alpha"]}
    shared["fan_in_fan_out"] = any(transposed.values())
    steps = SMALL["steps"]
    adaptive = kind is AdaLoRA
    config = (
        AdaLoraConfig(init_r=4, target_r=SMALL["rank"], total_step=steps, **shared)
        if adaptive
        else LoraConfig(r=SMALL["rank"], **shared)
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model.model, config)
    prompt = model.tokens.encode(REQUESTS[0].prompt)
    ids = model.tokens.encode(f"{REQUESTS[0].prompt} {REQUESTS[0].target_new}")
    labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
    # The divisor `ranknum` is a constant, but comes to require a gradient when it is cast from single precision.
    optimizer = torch.optim.Adam([p for n, p in adapted.named_parameters() if "lora_" in n], lr=5e-3)
    for step in range(1, steps + 1):
        adapted(input_ids=torch.tensor([ids]), labels=labels).loss.backward()
        optimizer.step()
        if adaptive:
            adapted.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()
    changes = {f"{name}.weight": merged.get_submodule(name).weight.detach() - before[name] for name in targets}
    return {name: change.T if transposed[name.removesuffix(".weight")] else change for name, change in changes.items()}


@pytest.mark.parametrize("kind", BOTH)
def test_update_is_what_peft_trains_and_merges(kind):
    path = "pkg://prune_lightning.bundled/model"
    targets = ["transformer.h.1.attn.c_attn", "transformer.h.2.attn.c_attn"]
    module = adapting(kind, load_language_model(path, "float64"), layers=[1, 2], target_modules=["c_attn"])
    updates, details = module.compute_update(REQUESTS[:1])
    expected = by_peft(kind, path, targets, seed=3)
    assert list(updates) == list(expected)
    for name, update in updates.items():
        assert relative(update.dense(), expected[name]) < 1e-8
        assert update.left.shape[1] <= 4
    assert details[0]["steps"] == len(details[0]["losses"]) == 6
    assert details[0]["losses"][-1] < details[0]["losses"][0]


@pytest.mark.parametrize("kind", BOTH)
def test_factors_are_the_weight_that_peft_would_merge(kind, bundled, monkeypatch):
    module, seen = adapting(kind, bundled, target_modules=["c_proj"]), {}
    merged = kind.merged

    def both(self, layer):
        update = merged(self, layer)
        seen[id(layer)] = relative(update.dense(), layer.get_delta_weight("edit").detach().T)
        return update

    monkeypatch.setattr(kind, "merged", both)
    updates = module.compute_update(REQUESTS)[0]
    assert len(seen) == len(updates) == 8, "attention and MLP of four layers have a c_proj each"
    assert max(seen.values()) < 1e-6


@pytest.mark.parametrize("targets", [None, ["c_attn", "c_fc"]])
def test_rank_is_pruned_to_its_goal(targets, bundled):
    module = adapting(AdaLoRA, bundled, layers=[1, 2], target_modules=targets, rank=3, initial_rank=8, steps=10)
    updates = module.compute_update(REQUESTS)[0]
    ranks = [int(torch.linalg.matrix_rank(update.dense().double(), rtol=1e-6)) for update in updates.values()]
    assert sum(ranks) == 3 * len(updates)
    assert [update.left.shape[1] for update in updates.values()] == ranks
    assert len(set(ranks)) > 1, "the budget is shared out by importance"


def test_orthogonality_penalty_is_what_peft_adds(bundled):
    module = adapting(AdaLoRA, bundled, layers=[1], target_modules=["c_attn"])
    ids = torch.tensor([bundled.tokens.encode("Lisbon is the capital of Spain")])
    plain = bundled.model(input_ids=ids, labels=ids).loss
    with module._adapters(10) as tuner:
        added = tuner(input_ids=ids, labels=ids).loss - plain
        assert float(module.penalty().detach()) == pytest.approx(float(added.detach()), rel=1e-5)


@pytest.mark.parametrize("layers", [[1], [2], [0, 2]])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_path_equals_the_plain_one(family, kind, layers, tiny, recwarn):
    model = tiny(family)
    first = {p.rpartition(".")[2] for p, m in model.block(0).named_modules() if isinstance(m, torch.nn.Linear)}
    targets = sorted(first)[:2] or ["c_attn", "c_proj"]
    fast, plain = (
        adapting(kind, model, layers=layers, target_modules=targets, batch_size=2, dropout=0.1, fast=fast)
        for fast in (True, False)
    )
    ours, theirs = fast.compute_update(REQUESTS), plain.compute_update(REQUESTS)
    assert not [w for w in recwarn if "fast path" in str(w.message)]
    assert set(ours[0]) == set(fast.edited_modules()) == set(theirs[0])
    # Elsewhere norms or attention run in fp32 whatever the dtype, and Adam divides by small numbers.
    exact = 1e-8 if family in ("gpt2", "gpt_neox") else 1e-3
    for name in ours[0]:
        if kind is LoRA or ours[0][name].left.shape[1]:  # AdaLoRA may prune a module to nothing
            assert relative(ours[0][name].dense(), theirs[0][name].dense()) < exact
        assert ours[0][name].left.shape == theirs[0][name].left.shape
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=exact)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_nothing_of_peft_is_left_on_the_model(kind, keep, bundled):
    assert bundled.block_returns_tuple in (True, False)
    before, weights = state(bundled), {n: p.detach().clone() for n, p in bundled.model.named_parameters()}
    config = bundled.model.config.to_dict()
    module = adapting(kind, bundled, layers=[1, 3], target_modules=["c_attn"], keep=keep, dropout=0.1)
    for _ in range(2):
        updates = module.compute_update(REQUESTS)[0]
        after = dict(bundled.model.named_parameters())
        assert list(after) == list(weights)
        assert all(torch.equal(after[n], w) and not after[n].requires_grad for n, w in weights.items())
        write(module, REQUESTS, updates)
        weights = {n: p.detach().clone() for n, p in bundled.model.named_parameters()}
    assert state(bundled) == before
    assert bundled.model.config.to_dict() == config


def test_the_model_is_restored_when_training_fails(bundled, monkeypatch):
    assert bundled.block_returns_tuple in (True, False)
    before = state(bundled)
    module = adapting(LoRA, bundled)
    monkeypatch.setattr(LoRA, "penalty", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.compute_update(REQUESTS)
    assert state(bundled) == before


@pytest.mark.parametrize("kind", BOTH)
def test_kept_adapters_are_trained_on_and_their_difference_is_written(kind, bundled):
    module = adapting(kind, bundled, layers=[1], target_modules=["c_attn"], keep=True, steps=8)
    ((name, matrix),) = module.edited_matrices().items()
    deltas, firsts = [], []
    for request in REQUESTS:
        updates, details = module.compute_update([request])
        write(module, [request], updates)
        deltas.append(matrix.delta().clone())
        firsts.append(details[0]["losses"][0])
        assert relative(matrix.delta(), module._merged[name].dense()) < 1e-5
    rank = 2 if kind is LoRA else 4
    assert int(torch.linalg.matrix_rank(deltas[-1].double(), rtol=1e-4)) <= rank, "one adapter, however many edits"
    alone = adapting(kind, load_language_model("pkg://prune_lightning.bundled/model"), layers=[1])
    assert firsts[0] == pytest.approx(alone.compute_update(REQUESTS[:1])[1][0]["losses"][0], rel=1e-4)
    # The second edit starts from the model that the first one left.
    assert firsts[1] != pytest.approx(alone.compute_update(REQUESTS[1:2])[1][0]["losses"][0], rel=1e-5)
    module.run.restore()
    again = module.compute_update(REQUESTS[:1])[0][name]
    assert again.left.shape[1] <= rank


def test_adapters_of_its_own_add_up(bundled):
    module = adapting(LoRA, bundled, layers=[1])
    ((name, matrix),) = module.edited_matrices().items()
    total = torch.zeros_like(matrix.delta())
    for request in REQUESTS:
        updates = module.compute_update([request])[0]
        assert updates[name].left.shape[1] == 2
        total += updates[name].dense()
        write(module, [request], updates)
    assert torch.allclose(matrix.delta(), total, atol=1e-7)
    assert matrix.change.factored().rank == 6


def test_an_update_without_a_rank_is_none(bundled):
    (matrix,) = adapting(LoRA, bundled, layers=[1]).edited_matrices().values()
    matrix.add(LowRankUpdate(torch.zeros(192, 0), torch.zeros(768, 0)))
    assert torch.equal(matrix.weight(), matrix.original())
    assert matrix.change.triplets_above(1e-6).left.shape[1] == 0
    assert float(matrix.change.singular_values().max()) == 0


@pytest.mark.parametrize("kind", BOTH)
def test_an_edit_does_not_depend_on_what_was_drawn_before(kind, bundled):
    module = adapting(kind, bundled, layers=[1], dropout=0.5)
    torch.manual_seed(1)
    one = module.compute_update(REQUESTS)[0]
    drawn = torch.rand(1)
    two = module.compute_update(REQUESTS)[0]
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "other random numbers are left alone"
    assert all(torch.equal(one[name].dense(), two[name].dense()) for name in one)
    dry = adapting(kind, bundled, layers=[1], dropout=0.0).compute_update(REQUESTS)[0]
    assert all(not torch.allclose(one[name].dense(), dry[name].dense(), rtol=0.1) for name in one)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_have_adapters_in_single_precision(kind, dtype, tiny):
    model = tiny("llama", dtype)
    module = adapting(kind, model, layers=[1, 2], target_modules=["q_proj", "down_proj"], steps=12)
    updates, details = module.compute_update(REQUESTS)
    assert all(update.left.dtype == update.right.dtype == torch.float32 for update in updates.values())
    assert all(detail["losses"][-1] < detail["losses"][0] for detail in details)
    original = {name: matrix.original().clone() for name, matrix in module.edited_matrices().items()}
    write(module, REQUESTS, updates)
    for name, matrix in module.edited_matrices().items():
        assert torch.equal(matrix.weight(), (original[name].float() + matrix.delta()).to(dtype))
        assert relative(matrix.delta(), updates[name].dense()) < 1e-6


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential", "sequential_batched"])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("restraint", ["prune", "rect"])
def test_restraints_and_monitor_under_every_protocol(restraint, kind, protocol, bundled):
    steps = {"steps": 6, "learning_rate": 0.1, "alpha": 32}
    module = adapting(kind, bundled, layers=[1], target_modules=["c_attn"], keep="sequential" in protocol, **steps)
    (matrix,) = module.edited_matrices().values()
    ends = []

    class Look(PRUNE):
        def restrain(self, matrix):
            super().restrain(matrix)
            ends.append((float(torch.linalg.matrix_norm(matrix.delta(), 2)), self.reference(matrix), self.metrics))

    callback = Look(1.5) if restraint == "prune" else RECT(0.2)
    stream = BundledWorld(num_edits=2, protocol=protocol, batch_size=2 if "batch" in protocol else 1)
    quiet_trainer(callback, SpectrumMonitor(every_n=2, draw=False)).fit(module, datamodule=stream)
    assert module.num_requests == 2
    assert module.run.last_report is not None
    assert module.run.last_report.applied
    if protocol in ("single", "batch"):
        assert torch.equal(matrix.weight(), matrix.original())
    else:
        assert float(matrix.delta().norm()) > 0
    for sigma, reference, metrics in ends:
        top = max(value for key, value in metrics.items() if key.endswith("sigma_bound"))
        assert top > reference, "the restraint has to have work to do"
        law = torch.log(torch.tensor(top / reference)) / torch.log(torch.tensor(1.5)) + reference
        assert sigma == pytest.approx(float(law), rel=1e-3)


def test_an_edit_that_is_not_finite_does_not_enter_the_kept_adapters(bundled):
    module = adapting(LoRA, bundled, layers=[1], keep=True)
    loader = torch.utils.data.DataLoader([EditBatch(tuple(REQUESTS[:1]))], batch_size=None)
    merged = LoRA.merged
    module.merged = lambda layer: type(u := merged(module, layer))(u.left * float("nan"), u.right)
    with pytest.warns(UserWarning, match="not finite"):
        quiet_trainer().fit(module, loader)
    assert not module._kept


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (LoRA, {"target_modules": ["c_atn"]}, "did you mean 'c_attn'"),
        (LoRA, {"rank": 0}, "method.rank"),
        (LoRA, {"dropout": 1.0}, "method.dropout"),
        (AdaLoRA, {"initial_rank": 2}, "method.initial_rank"),
        (AdaLoRA, {"steps": 1}, "method.steps"),
    ],
)
def test_bad_options_are_reported(kind, option, message, tiny):
    with pytest.raises(UserError, match=message):
        adapting(kind, tiny("gpt2"), **option)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_is_that_of_pytorch_on_the_cpu(dtype):
    layers, x = (
        torch.nn.ModuleDict({"a": torch.nn.Dropout(0.3), "b": torch.nn.Identity()}),
        torch.randn(7, 33).to(dtype),
    )
    torch.manual_seed(5)
    expected = layers["a"](x)
    draw_on_the_cpu(layers)
    torch.manual_seed(5)
    assert torch.equal(layers["a"](x), expected)
    assert torch.equal(layers["a"].eval()(x), x)
    assert type(layers["b"]) is torch.nn.Identity
