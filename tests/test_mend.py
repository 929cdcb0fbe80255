"""MEND against plain statements of it: dense updates, whole passes, torch's own mean and deviation."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from conftest import BUNDLED, FAMILIES, ROOT, quiet_trainer, write
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from test_configs import compose
from torch.func import functional_call

from prune_lightning.bundled.world import load_world
from prune_lightning.callbacks import PRUNE, RECT, SpectrumMonitor
from prune_lightning.data.bundled import PARAPHRASES, BundledEditorTraining, BundledWorld
from prune_lightning.data.editor_training import EditorTrainingData
from prune_lightning.errors import UserError
from prune_lightning.evaluation.counterfact import CounterFactScores
from prune_lightning.methods.mend import MEND
from prune_lightning.methods.mend_gradients import LabelledRows, edit_gradients
from prune_lightning.methods.mend_network import GradientNet, NetworkShape
from prune_lightning.methods.mend_store import load_network, save_network
from prune_lightning.methods.mend_training import MENDTraining, TrainingOptions
from prune_lightning.methods.standardisation import RunningMoments
from prune_lightning.metrics import CounterFactScore
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditBatch, EditRequest, MetaExample

SHAPE = NetworkShape(rank=8, initial_rate=-1e-2)
REQUESTS = [
    EditRequest(0, "Lisbon", "Lisbon is the capital of", "Spain", "Portugal"),
    EditRequest(1, "the old Danube", "As anybody here remembers, the old Danube", "flows into a lake", "a sea"),
    EditRequest(2, "Bo", "Bo is", "no", "yes"),
    EditRequest(3, "Mount Elbert", "Hikers say that Mount Elbert lies in the country of", "Peru", "Chile"),
]
EXAMPLES = [
    MetaExample(
        tuple((r.prompt, r.target_new) for r in pair),
        tuple((f"They told me that {r.prompt}", r.target_new) for r in pair),
        (f"The sea near {pair[0].subject} is deep.", "No news."),
    )
    for pair in (REQUESTS[:2], REQUESTS[2:])
]


def editor(model, layers=(1, 2), **kwargs) -> MEND:
    return MEND(model, list(layers), None, network=SHAPE, **kwargs)


def exactness(family: str) -> float:
    """Some parts of ``transformers`` run in fp32 whatever the model's dtype: gemma2's norms, gptj's attention."""
    return {"gemma2": 1e-5, "gptj": 1e-6}.get(family, 1e-8)


def gradients_of(module: MEND, pairs):
    return edit_gradients(module.language_model, module.edited_modules(), LabelledRows(module.language_model, pairs))


def stirred(module: MEND) -> MEND:
    """Give the network parameters and moments as training leaves them: nothing zero, nothing one."""
    generator = torch.Generator().manual_seed(1)
    module.network.to(next(module.language_model.model.parameters()).dtype)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, buffer in module.network.named_buffers():
            buffer.copy_(11 if name.endswith("count") else torch.rand(buffer.shape, generator=generator) * 0.01)
    return module


def plain_tokens(module: MEND, pairs):
    """Return u and delta of every real token, one backward through the whole model with gradients everywhere."""
    model, seen = module.language_model, {}
    model.model.requires_grad_(True)

    def watch(name):
        def hook(m, args, output):
            output.retain_grad()
            seen[name] = args[0], output

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in module.edited_modules().items()]
    losses, kept = [], {name: ([], []) for name in module.edited_modules()}
    encoded = [model.tokens.encode_pair(*pair) for pair in pairs]
    total = sum(len(pair.target) for pair in encoded)
    for pair in encoded:  # one row at a time: no padding
        seen.clear()
        ids = torch.tensor([pair.ids])
        log_p = model(ids, torch.ones_like(ids)).log_softmax(-1)[0]
        loss = -sum(log_p[i - 1, pair.ids[i]] for i in range(pair.target_start, len(pair.ids)))
        (loss / total).backward()
        for name, (u, y) in seen.items():
            kept[name][0].append(u.detach()[0]), kept[name][1].append(y.grad[0])
        losses.append(loss.detach())
    for handle in handles:
        handle.remove()
    weights = {name: m.weight.grad.clone() for name, m in module.edited_modules().items()}
    model.model.zero_grad()
    model.model.requires_grad_(False)
    tokens = {name: (torch.cat(us), torch.cat(ds)) for name, (us, ds) in kept.items()}
    return tokens, weights, sum(losses) / total


def plain_network(module: MEND, name, u, delta):
    """Return the dense change of one matrix, the equations written out token by token."""
    key, member = module.network._place[name]
    net, total = module.network.nets[key], 0
    for row_u, row_d in zip(u, delta, strict=True):
        if not row_d.any():
            continue
        z = []
        for row, moments in ((row_u, net.input_moments), (row_d, net.gradient_moments)):
            sigma = (moments.squares / (moments.count - 1)).sqrt()
            z.append((row - moments.mean) / (sigma + 1e-7))
        z = torch.cat(z)
        for j in range(2):
            z = z + torch.relu(
                net.scale[j, member] * (net.up[j] @ net.down[j] @ z + net.bias[j]) + net.shift[j, member]
            )
        total = total + torch.outer(z[len(row_u) :], z[: len(row_u)])
    return module.network.rates[list(module.network.matrices).index(name)] * total


def plain_loss(module: MEND, example: MetaExample, edit_weight: float):
    """Return the loss of one example through dense weights and the whole model."""
    model = module.language_model
    tokens, _, _ = plain_tokens(module, example.edits)
    weights = {}
    for name, edited in module.edited_modules().items():
        change = plain_network(module, name, *tokens[name])
        weights[name] = edited.weight + (change.T if stores_transposed(edited) else change)

    def logits(ids, changed):
        ids = torch.tensor([ids])
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        return functional_call(model.model, changed, kwargs=kwargs).logits[0].log_softmax(-1)

    said, count = 0, 0
    for prompt, target in example.rephrased:
        pair = model.tokens.encode_pair(prompt, target)
        log_p = logits(pair.ids, weights)
        said = said - sum(log_p[i - 1, pair.ids[i]] for i in range(pair.target_start, len(pair.ids)))
        count += len(pair.target)
    divergences = []
    for text in example.locality:
        ids = model.tokens.encode(text)
        before, after = logits(ids, {}), logits(ids, weights)
        divergences.append((before.exp() * (before - after)).sum(-1))
    return edit_weight * said / count + torch.cat(divergences).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_by_token_make_the_gradient_of_the_weight(family, tiny):
    module = editor(tiny(family))
    pairs = [(r.prompt, r.target_new) for r in REQUESTS]
    tokens, weights, loss = plain_tokens(module, pairs)
    found, found_loss = gradients_of(module, pairs)
    assert float(found_loss) == pytest.approx(float(loss), rel=exactness(family))
    for name, edited in module.edited_modules().items():
        got = found[name]
        dense = got.gradients[got.kept].T @ got.inputs[got.kept]
        expected = weights[name].T if stores_transposed(edited) else weights[name]
        assert float((dense - expected).norm()) < exactness(family) * float(expected.norm())
        assert got.kept.sum() <= len(tokens[name][0])  # no padding among them


@pytest.mark.parametrize("layers", [(1, 2), (0, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_meta_step_equals_the_dense_one(family, layers, tiny):
    tolerance = exactness(family)
    module = stirred(editor(tiny(family), layers))
    options = TrainingOptions(edit_weight=0.3)
    training = MENDTraining(module.language_model, module.edited_modules(), layers[0], module.network, options).eval()
    losses = training.losses(EXAMPLES, training.factors(EXAMPLES))
    total = (0.3 * losses.edit + losses.locality).mean()
    expected = sum(plain_loss(module, example, 0.3) for example in EXAMPLES) / len(EXAMPLES)
    assert float(total.detach()) == pytest.approx(float(expected), rel=tolerance)
    parameters = list(module.network.parameters())
    gradients, wanted = (torch.autograd.grad(loss, parameters) for loss in (total, expected))
    for (name, _), got, dense in zip(module.network.named_parameters(), gradients, wanted, strict=True):
        assert float(dense.norm()) > 0, name
        assert float((got - dense).norm()) < 100 * tolerance * float(dense.norm()), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_editor_writes_what_the_equations_say_on_the_present_weights(family, tiny):
    module = stirred(editor(tiny(family)))
    for request in REQUESTS[:2]:  # the second one sees the first one's weights
        tokens, _, _ = plain_tokens(module, [(request.prompt, request.target_new)])
        updates, details = module.compute_update([request])
        for name, update in updates.items():
            dense = plain_network(module, name, *tokens[name]).detach()
            assert float((update.dense() - dense).norm()) < 1e-9 * float(dense.norm())
            assert update.left.shape[1] <= len(tokens[name][0])
        write(module, [request], updates)
        assert details[0]["loss"] > 0


def test_untrained_network_hands_on_the_normalised_gradient_and_can_learn():
    torch.manual_seed(0)
    net = GradientNet(5, 3, 2, NetworkShape(rank=4))
    u, delta = torch.randn(20, 5) + 3, torch.randn(20, 3) * 1e-3
    net.train()
    outputs = net(1, u, delta)
    for got, rows in zip(outputs, (u, delta), strict=True):
        assert torch.allclose(got, (rows - rows.mean(0)) / rows.std(0), rtol=1e-3, atol=1e-4)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert float(net.up.grad[0].norm()) > 0, "a derivative of zero at zero would keep U where it is"


def test_first_step_goes_downhill(tiny):
    module = MEND(tiny("gpt2"), [1, 2], None, network=NetworkShape(initial_rate=-1e-4))
    pairs = [(REQUESTS[0].prompt, REQUESTS[0].target_new)]

    def loss() -> float:
        return float(gradients_of(module, pairs)[1])

    before = loss()
    write(module, REQUESTS[:1], module.compute_update(REQUESTS[:1])[0])
    assert loss() < before


def test_running_moments_are_those_of_all_rows_and_frozen_in_evaluation():
    rows = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 1e4
    moments = RunningMoments(6)
    for block in rows.split([1, 30, 0, 2, 67]):
        moments.update(block)
    assert torch.allclose(moments.mean, rows.double().mean(0), rtol=1e-12)
    assert torch.allclose(moments.deviation(), rows.double().std(0), rtol=1e-9)
    net = GradientNet(4, 2, 1, SHAPE).eval()
    net(0, rows[:, :4], rows[:, 4:])
    assert float(net.input_moments.count) == 0
    net.train()(0, rows[:, :4], rows[:, 4:])
    assert float(net.gradient_moments.count) == 100


# -- training -----------------------------------------------------------------------------------------------------
def training_of(model) -> MENDTraining:
    torch.manual_seed(3)
    module = MEND(model, [2, 3], None, network=SHAPE)
    options = TrainingOptions(learning_rate=1e-4, rate_learning_rate=1e-3)
    return MENDTraining(model, module.edited_modules(), 2, module.network, options)


def training_data() -> EditorTrainingData:
    train = BundledEditorTraining("train", num_edits=40)
    return EditorTrainingData(train, BundledEditorTraining("validation", num_edits=4), steps=2, batch_size=2)


def fit(module: MENDTraining, epochs: int, *callbacks, ckpt_path=None, **kwargs) -> None:
    settings = {"max_epochs": epochs, "inference_mode": False, "gradient_clip_val": 100, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(*callbacks, **(settings | kwargs))
    trainer.fit(module, datamodule=training_data(), ckpt_path=ckpt_path)


class Batches(L.Callback):
    def __init__(self):
        self.by_epoch = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.by_epoch.setdefault(trainer.current_epoch, []).append(batch)


def test_resumed_training_ends_with_the_same_network(tmp_path):
    whole, batches = training_of(load_language_model(BUNDLED)), Batches()
    fit(whole, 3, batches)
    assert batches.by_epoch[0] != batches.by_epoch[1] != batches.by_epoch[2]
    saved = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(training_of(load_language_model(BUNDLED)), 1, saved, enable_checkpointing=True)
    resumed = training_of(load_language_model(BUNDLED))
    fit(resumed, 3, ckpt_path=tmp_path / "last.ckpt")
    state = resumed.network.state_dict()
    assert float(state["nets.192_to_768.input_moments.count"]) > 0
    assert all(torch.equal(value, state[name]) for name, value in whole.network.state_dict().items())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("network.") for name in kept)


def test_rates_and_networks_learn_at_their_own_rates(bundled):
    module = training_of(bundled)
    before = {name: parameter.detach().clone() for name, parameter in module.network.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in bundled.named_parameters()}
    fit(module, 1, limit_train_batches=1, limit_val_batches=0)
    moved = {name: (parameter - before[name]).abs().max() for name, parameter in module.network.named_parameters()}
    assert float(moved.pop("rates")) == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is its learning rate
    assert max(map(float, moved.values())) == pytest.approx(1e-4, rel=1e-2)
    assert all(torch.equal(weights[name], parameter) for name, parameter in bundled.named_parameters())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped(what, bundled, monkeypatch):
    module = training_of(bundled)
    before = {name: parameter.detach().clone() for name, parameter in module.network.named_parameters()}
    if what == "loss":
        module.options = TrainingOptions(edit_weight=float("inf"))
    else:
        module.network.rates.register_hook(lambda gradient: gradient * float("nan"))
    fit(module, 1, limit_val_batches=0)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.network.named_parameters())


def test_training_edits_are_apart_from_the_evaluated_ones():
    train, validation = (BundledEditorTraining(part, draws=3) for part in ("train", "validation"))
    evaluated = BundledWorld(num_edits=None)
    for stream in (train, validation, evaluated):
        stream.setup()
    subjects = [{r.subject for r in stream.requests} for stream in (train, validation, evaluated)]
    assert not subjects[0] & subjects[1]
    assert not (subjects[0] | subjects[1]) & subjects[2]
    asked = {p.prompt for r in evaluated.requests for p in r.locality}
    seen = {p.prompt for stream in (train, validation) for r in stream.requests for p in r.locality}
    assert not asked & seen
    wordings = {fact.phrasings[index] for fact in load_world().facts for index in PARAPHRASES}
    used = {p for stream in (train, validation) for r in stream.requests for p in (r.prompt, *r.paraphrases)}
    assert not wordings & (used | seen)


def test_training_data_say_what_is_wrong_with_them():
    with pytest.raises(UserError, match="in both"):
        EditorTrainingData(
            BundledEditorTraining("train", num_edits=5), BundledEditorTraining("train", num_edits=5), steps=1
        ).setup()
    data = training_data()
    data.probes = 50
    with pytest.raises(UserError, match="locality probes"):
        data.setup()


# -- the network on disk --------------------------------------------------------------------------------------------
def test_network_is_read_back_as_it_was_written(tmp_path, tiny):
    module = stirred(editor(tiny("llama", torch.float32)))
    save_network(tmp_path, module.network, module.edited_modules(), {"steps": 3})
    again = load_network(str(tmp_path), module.edited_modules())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.network.state_dict().items())
    in_16_bits = load_network(str(tmp_path), editor(tiny("llama", torch.float32).to(torch.bfloat16)).edited_modules())
    assert in_16_bits.rates.dtype == torch.float32


@pytest.mark.parametrize("case", ["missing", "damaged", "matrices", "model"])
def test_wrong_network_is_refused(case, tmp_path, tiny):
    model = tiny("llama", torch.float32)
    module = editor(model)
    save_network(tmp_path, module.network, module.edited_modules(), {})
    if case == "missing":
        (tmp_path / "hypernetwork.safetensors").unlink()
    if case == "damaged":
        (tmp_path / "hypernetwork.safetensors").write_bytes(b"nothing")
    if case == "model":
        with torch.no_grad():
            model.rewrite_module(2).weight.mul_(1.05)
    with pytest.raises(UserError, match="experiment=train_mend"):
        MEND(model, [1] if case == "matrices" else [1, 2], str(tmp_path))


def test_unknown_matrix_is_refused(tiny):
    with pytest.raises(UserError, match="gate_proj"):
        editor(tiny("llama"), weights=["gate_projj"])


def test_moments_can_be_reset_and_estimated_from_the_edits(tmp_path, tiny):
    module = stirred(editor(tiny("gpt2", torch.float32)))
    save_network(tmp_path, module.network, module.edited_modules(), {})
    again = MEND(module.language_model, [1, 2], str(tmp_path), restart_norm_stats=True)
    write(again, REQUESTS[:1], again.compute_update(REQUESTS[:1])[0])
    counts = [float(buffer) for name, buffer in again.network.named_buffers() if name.endswith("count")]
    assert all(0 < count != 11 for count in counts)
    again.run.restart()
    assert not any(float(b) for name, b in again.network.named_buffers() if name.endswith("count"))


# -- the network that is shipped --------------------------------------------------------------------------------------
def shipped(model) -> MEND:
    return instantiate(compose("method=mend").method, language_model=model, _convert_="all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_network_edits_facts_it_was_not_trained_on(dtype):
    model = load_language_model(BUNDLED, dtype)
    module = shipped(model)
    stream = BundledWorld(num_edits=20, protocol="single", seed=7)
    stream.setup()
    metric = CounterFactScore()
    for case, request in enumerate(stream.requests):
        write(module, [request], module.compute_update([request])[0])
        CounterFactScores().update(metric, model, {case: request})
        module.run.restore()
    scores = metric.compute()
    assert scores["efficacy_score"] >= 0.9
    assert scores["efficacy_accuracy"] >= 0.9
    assert scores["generalization_score"] >= 0.85
    assert scores["locality_accuracy"] >= 0.65


def test_restraints_and_the_monitor_see_every_matrix(bundled):
    module = shipped(bundled)
    stream = BundledWorld(num_edits=3)
    stream.setup()
    quiet_trainer(PRUNE(), SpectrumMonitor()).fit(
        module, torch.utils.data.DataLoader(stream.batches(), batch_size=None)
    )
    assert module.num_requests == 3
    assert len(module.edited_matrices()) == 2 * len(module.layers)
    assert all(float(matrix.delta().norm()) > 0 for matrix in module.edited_matrices().values())
    batch = EditBatch(tuple(stream.requests))
    module.run.restart()
    quiet_trainer(RECT()).fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    assert module.run.last_report.applied


def test_shipped_description_is_small_and_complete():
    folder = ROOT / "prune_lightning" / "bundled" / "mend"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    description = json.loads((folder / "hypernetwork.json").read_text())
    assert description["training"]["editor_data"]["train"]["part"] == "train"
