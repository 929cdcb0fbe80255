"""CrispEdit's projection against dense statements: the space, its statistics, and trainings that stay in it or not."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from conftest import dense_space, quiet_trainer
from peft import LoraConfig, get_peft_model
from test_fine_tuning import REQUESTS, plain_loss
from test_ledger import Given
from test_other_loops import train
from test_restraint import RandomEdits, Regression, edits, fit, regression_batches
from torch import nn
from torch.utils.data import DataLoader

from prune_lightning.callbacks import LowCurvature, SubspaceFilter
from prune_lightning.errors import UserError
from prune_lightning.methods.fine_tuning import FineTuning
from prune_lightning.models import batching
from prune_lightning.models.curvature import BatchCurvature, CorpusCurvature
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.spectral import LowCurvatureSpace
from prune_lightning.types import EditBatch

SHARE = 0.9
TEXTS = ("The old dog lives in Japan.", "A red bridge", "Because it rained all day, the river is long.")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed, decay=0.5):
    vectors = random(size, size, seed=seed)
    return vectors @ torch.diag(decay ** torch.arange(size, dtype=torch.float64)) @ vectors.T


def close(ours, theirs, tolerance=1e-10):
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


# -- the space --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_projection_is_that_of_the_dense_kronecker_product(share):
    outputs, inputs, change = moment(5, 1), moment(7, 2), random(5, 7)
    space = LowCurvatureSpace(outputs, inputs, share, torch.float64)
    assert close(space.project(change), dense_space(outputs, inputs, share)(change))
    assert 0 < space.free_share < 1


def test_it_is_an_orthogonal_projection_and_leaves_less_than_the_rest_of_the_curvature():
    outputs, inputs = moment(5, 1), moment(7, 2)
    space = LowCurvatureSpace(outputs, inputs, 0.99, torch.float64)
    one, other = random(5, 7), random(5, 7, seed=3)
    assert close(space.project(space.project(one)), space.project(one))
    assert float((space.project(one) * other).sum()) == pytest.approx(float((one * space.project(other)).sum()))

    def curvature(change):
        return float(torch.trace(outputs @ change @ inputs @ change.T))

    # Over all directions: the mean of a quadratic form under white noise is its trace.
    pairs = [torch.zeros(5, 7, dtype=torch.float64) for _ in range(35)]
    for index, pair in enumerate(pairs):
        pair.view(-1)[index] = 1
    left = sum(curvature(space.project(pair)) for pair in pairs)
    assert 0 < left <= 0.01 * sum(curvature(pair) for pair in pairs)


def test_the_null_space_of_the_inputs_is_in_it():
    """AlphaEdit's updates are (proposition 1)."""
    keys = random(7, 4)
    space = LowCurvatureSpace(moment(5, 1), keys @ keys.T, 0.99, torch.float64)
    null = torch.eye(7, dtype=torch.float64) - keys @ torch.linalg.pinv(keys)
    change = random(5, 7) @ null
    assert close(space.project(change), change)


def test_what_has_no_curvature_is_refused():
    with pytest.raises(UserError, match="does not depend"):
        LowCurvatureSpace(torch.zeros(3, 3), torch.eye(4), 0.9)
    with pytest.raises(UserError, match="not finite"):
        LowCurvatureSpace(torch.full((3, 3), float("nan")), torch.eye(4), 0.9)


# -- statistics -------------------------------------------------------------------------------------------------------
def loss_of(module, batch):
    return module.training_step(batch, 0)


def by_hand(module, batches):
    """The factors of the two matrices of a linear network, from its formulas."""
    one, two = module.first.weight.detach(), module.second.weight.detach()
    inputs = torch.cat([x for x, _ in batches])
    error = 2 * (inputs @ one.T @ two.T - torch.cat([y for _, y in batches]))
    hidden, below = inputs @ one.T, error @ two
    return {"first.weight": (below.T @ below, inputs.T @ inputs), "second.weight": (error.T @ error, hidden.T @ hidden)}


def test_the_default_loss_is_the_sum_over_the_tokens_that_are_predicted(tiny):
    """Batches of other lengths and label counts: each token counts once, whatever batch it is in."""
    model = tiny("gpt2").model.double().eval()
    name = next(name for name, _ in model.named_parameters() if name.endswith("1.mlp.c_proj.weight"))
    module = model.get_submodule(name.rpartition(".")[0])
    ids = torch.arange(1, 25) % 17
    batches = [{"input_ids": part, "labels": part.clone()} for part in (ids[:4][None], ids[4:].view(2, 10))]
    batches[1]["labels"][0, :6] = -100
    outputs, inputs = [], []
    for batch in batches:
        kept = []

        def cut(_, args, out, kept=kept):
            kept.append((args[0], out.detach().requires_grad_()))
            return kept[0][1]

        handle = module.register_forward_hook(cut)
        with torch.enable_grad():
            logits = model(batch["input_ids"]).logits
            rows = [
                -logits[row, place - 1].log_softmax(-1)[label]
                for row, labels in enumerate(batch["labels"].tolist())
                for place, label in enumerate(labels)
                if place and label != -100
            ]
            ((keys, values),) = kept
            outputs.append(torch.autograd.grad(torch.stack(rows).sum(), values)[0].flatten(0, -2))
        inputs.append(keys.detach().flatten(0, -2))
        handle.remove()
    expected = [torch.cat(rows).T @ torch.cat(rows) for rows in (outputs, inputs)]
    found = BatchCurvature(batches).factors(model, [name])[name]
    assert close(found[0], expected[0], 1e-5)  # the loss of transformers is in fp32
    assert close(found[1], expected[1])
    with pytest.raises(UserError, match="labels"):
        BatchCurvature([{"input_ids": ids[None]}]).factors(model, [name])


def test_factors_of_batches_are_those_of_the_formulas_and_leave_no_trace():
    module, batches = Regression(), regression_batches(3)
    module.first.weight.grad = torch.ones_like(module.first.weight)
    found = BatchCurvature(batches, loss_of).factors(module, ["first.weight", "second.weight"])
    for name, expected in by_hand(module, batches).items():
        for one, other in zip(found[name], expected, strict=True):
            assert close(one, other)
    assert torch.equal(module.first.weight.grad, torch.ones_like(module.first.weight))
    assert module.second.weight.grad is None
    assert module.training
    with pytest.raises(UserError, match="at least one batch"):
        BatchCurvature([], loss_of).factors(module, ["first.weight"])
    module.third = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"does not run the module of third\.weight"):
        BatchCurvature(batches, loss_of).factors(module, ["third.weight"])


class Texts:
    def texts(self):
        return list(TEXTS)

    def __len__(self):
        return len(TEXTS)

    def identity(self):
        return "three texts"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_factors_of_a_corpus_are_those_of_its_texts_alone(family, tiny, tmp_path, monkeypatch):
    """One text after another, unpadded, from the plain model; the cache of the second moments serves both."""
    model, layers = tiny(family), (0, 2)
    moments = SecondMoments(Texts(), cache=tmp_path)
    names = [model.rewrite_name(layer) for layer in layers]
    found = CorpusCurvature(moments).factors(model, names)
    assert all(p.grad is None for p in model.parameters())
    tokens = sum(len(model.tokens.encode(text)) for text in TEXTS)
    for layer, name in zip(layers, names, strict=True):
        outputs, inputs = torch.zeros(32, 32).double(), torch.zeros(32, 32).double()
        for text in TEXTS:
            kept = {}

            def keep(module, args, output, kept=kept):
                kept["input"], kept["output"] = args[0], output.detach().requires_grad_()
                return kept["output"]

            handle = model.rewrite_module(layer).register_forward_hook(keep)
            ids = torch.tensor([model.tokens.encode(text)])
            with torch.enable_grad():
                loss = model.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
                (gradient,) = torch.autograd.grad(-loss, [kept["output"]])
            handle.remove()
            outputs += gradient[0].T @ gradient[0] / tokens
            inputs += kept["input"][0].T @ kept["input"][0] / tokens
        # Both are stored in fp32; Llama's norms compute in it.
        assert close(found[name][0], outputs, 1e-5)
        assert close(found[name][1], inputs, 1e-5)
    monkeypatch.setattr(CorpusCurvature, "take", None)
    monkeypatch.setattr(SecondMoments, "take", None)
    again = CorpusCurvature(moments).factors(model, names)
    assert all(torch.equal(a, b) for name in names for a, b in zip(again[name], found[name], strict=True))
    with pytest.raises(UserError, match="down-projections only"):
        CorpusCurvature(moments).factors(model, ["lm_head.weight"])
    with pytest.raises(UserError, match="second moments with a corpus"):
        CorpusCurvature(SecondMoments(None)).factors(model, names)


def test_a_conv1d_is_projected_as_a_linear_layer_is(tiny):
    """Its weight is stored the other way round: inputs are inputs all the same, for every filter."""
    model = tiny("gpt2").model
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    pattern = "*.h.1.mlp.c_fc.weight"
    model.requires_grad_(True)
    statistics = BatchCurvature([{"input_ids": ids, "labels": ids}])
    for callback in (
        LowCurvature(statistics, SHARE, parameters=pattern),
        SubspaceFilter(0.3, "input", parameters=pattern),
    ):
        callback.attach(model)
        ((name, matrix),) = callback.matrices.items()
        original, change = matrix.original().clone(), random(*matrix.original().shape)
        factors = statistics.factors(model, [name])[name]
        assert torch.equal(original, model.get_parameter(name).detach().T)
        with torch.no_grad():
            model.get_parameter(name).add_(change.T)
        callback.after_step(1)
        if isinstance(callback, LowCurvature):
            expected = dense_space(*factors, SHARE)(change)
        else:
            right = torch.linalg.svd(original)[2][: callback.figures()["num_directions"]]
            expected = change - change @ right.T @ right
        assert close(matrix.weight() - original, expected)
        with torch.no_grad():
            model.get_parameter(name).copy_(original.T)


# -- any training -----------------------------------------------------------------------------------------------------
class Adam(Regression):
    """The same under Adam with weight decay."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


def outside(module, kind):
    """Return, by matrix, how much of its change is outside of the space, relative to the change."""
    original = kind()
    for name, (outputs, inputs) in by_hand(original, regression_batches(3)).items():
        change = module.get_parameter(name).detach() - original.get_parameter(name).detach()
        yield float((change - dense_space(outputs, inputs, SHARE)(change)).norm() / change.norm())


@pytest.mark.parametrize("kind", [Regression, Adam])
@pytest.mark.parametrize("project", ["update", "gradient"])
def test_only_a_projected_update_stays_in_the_space_under_adam(project, kind):
    module = kind()
    callback = LowCurvature(BatchCurvature(regression_batches(3), loss_of), SHARE, project)
    fit(module, regression_batches(6), callback)
    assert 0 < callback.figures()["kept_norm"] < 1
    for share in outside(module, kind):
        if project == "gradient" and kind is Adam:
            assert share > 0.05
        else:
            assert share < 1e-10


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_a_training_is_the_loop_that_the_paper_describes(project):
    module, plain, batches = Adam(), Adam(), regression_batches(6)
    fit(module, batches, LowCurvature(BatchCurvature(regression_batches(3), loss_of), SHARE, project))
    weights = {name: plain.get_parameter(name) for name in ("first.weight", "second.weight")}
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    spaces = {name: dense_space(*both, SHARE) for name, both in by_hand(plain, regression_batches(3)).items()}
    optimizer = plain.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        for name, weight in weights.items() if project == "gradient" else ():
            weight.grad.copy_(spaces[name](weight.grad))
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items() if project == "update" else ():
                weight.copy_(originals[name] + spaces[name](weight - originals[name]))
    for name, weight in weights.items():
        assert close(module.get_parameter(name).detach(), weight.detach(), 1e-9)


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_a_resumed_training_keeps_the_space_of_the_originals(project, tmp_path):
    class SaveAfterThree(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    batches, straight, resumed = regression_batches(6), Regression(), Regression()
    fit(
        straight,
        batches,
        LowCurvature(BatchCurvature(regression_batches(3), loss_of), SHARE, project),
        SaveAfterThree(),
    )
    rest = DataLoader(batches[3:] + batches[:3], batch_size=None)  # Lightning counts on, but restarts the loader
    callback = LowCurvature(BatchCurvature([], loss_of), SHARE, project)  # nothing is computed again
    quiet_trainer(callback).fit(resumed, rest, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.allclose(straight.first.weight, resumed.first.weight, atol=1e-12)


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_under_the_hugging_face_trainer(project, tiny, tmp_path):
    """Under plain gradient descent both ways stay in the space, and a resumed training in the same one."""
    ids = torch.randint(0, 500, (3, 9), generator=torch.Generator().manual_seed(0))
    statistics = BatchCurvature([{"input_ids": row[None], "labels": row[None]} for row in ids])
    callback = LowCurvature(statistics, SHARE, project, parameters="*.1.mlp.c_proj.weight")
    train(tiny("gpt2").model, tmp_path, callback, steps=3, save=2)
    ((name, matrix),) = callback.matrices.items()
    change = matrix.delta()
    share = float((change - callback._spaces[name].project(change)).norm() / change.norm())
    assert share < 1e-10
    assert float(change.norm()) > 1e-3 * float(matrix.original().norm())
    resumed = LowCurvature(BatchCurvature([]), SHARE, project, parameters="*.1.mlp.c_proj.weight")
    train(tiny("gpt2").model, tmp_path, resumed, steps=3, resume=tmp_path / "checkpoint-2")
    assert close(resumed.matrices[name].weight(), matrix.weight(), 1e-9)


# -- edits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("project", ["update", "gradient"])
def test_fine_tuning_is_the_loop_that_the_paper_describes(project, family, tiny):
    """Two steps of one request each, every one with an Adam of its own."""
    model = tiny(family)
    setting = {"layers": [1], "loss": "target", "learning_rate": 5e-3, "steps": 4, "stop_loss": 0.0, "skip_loss": 0.0}
    module = FineTuning(language_model=model, **setting)
    callback = LowCurvature(Given(), SHARE, project)
    fit(module, [EditBatch((request,)) for request in REQUESTS[:2]], callback)
    (matrix,) = module.edited_matrices().values()
    plain = tiny(family)
    weight, transposed = plain.rewrite_module(1).weight, family == "gpt2"
    original, project_dense = weight.detach().clone(), dense_space(*Given().factors(None, ["x"])["x"], SHARE)

    def projected(stored):
        return project_dense(stored.T).T if transposed else project_dense(stored)

    weight.requires_grad_(True)
    for request in REQUESTS[:2]:
        optimizer = torch.optim.Adam([weight], lr=5e-3)
        for _ in range(4):
            optimizer.zero_grad()
            plain_loss(plain, request, "target").backward()
            if project == "gradient":
                weight.grad.copy_(projected(weight.grad))
            optimizer.step()
            if project == "update":
                with torch.no_grad():
                    weight.copy_(original + projected(weight - original))
    stored = matrix.delta().T if transposed else matrix.delta()
    # Llama's norms compute in fp32, whose rounding Adam's first steps magnify.
    assert close(stored, weight.detach() - original, 1e-8 if family == "gpt2" else 1e-4)
    assert len(matrix.journal) == 1, "nothing is left for the restraint to subtract"


def test_a_second_run_of_the_module_without_the_restraint_is_not_projected(tiny):
    setting = {"layers": [1], "loss": "target", "learning_rate": 5e-3, "steps": 2}
    module = FineTuning(language_model=tiny("gpt2"), **setting)
    fit(module, [EditBatch((REQUESTS[0],))], LowCurvature(Given(), SHARE))
    module.run.restart()
    fit(module, [EditBatch((REQUESTS[0],))])
    alone = FineTuning(language_model=tiny("gpt2"), **setting)
    fit(alone, [EditBatch((REQUESTS[0],))])
    ours, theirs = (next(iter(m.edited_matrices().values())).weight() for m in (module, alone))
    assert torch.equal(ours, theirs)


def test_what_cannot_be_projected_is_refused(tiny):
    with pytest.raises(UserError, match="share"):
        LowCurvature(Given(), 1.0)
    with pytest.raises(UserError, match="did you mean 'update'"):
        LowCurvature(Given(), project="updates")
    with pytest.raises(UserError, match="no gradient of its weights to project"):
        fit(RandomEdits(tiny("llama"), [1]), edits(1), LowCurvature(Given(), project="gradient"))
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    with pytest.raises(UserError, match="under LoRA"):
        LowCurvature(Given()).attach(get_peft_model(model, LoraConfig(target_modules=["0"])))
    bounded = FineTuning(language_model=tiny("gpt2"), layers=[1], loss="target", epsilon=1e-3)
    with pytest.raises(UserError, match=r"method\.epsilon"):
        fit(bounded, [EditBatch((REQUESTS[0],))], LowCurvature(Given()))


def test_the_curvature_of_a_large_vocabulary_is_taken_in_small_batches(tiny, monkeypatch):
    """The logits at all tokens are in memory at once, their gradients too."""
    model = tiny("gpt2")
    curvature, rows = CorpusCurvature(SecondMoments(Texts())), []
    (together,) = curvature.take(model, [1]).values()
    model.model.register_forward_pre_hook(lambda *seen: rows.append(len(seen[2]["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(batching, "LOGITS", model.config.vocab_size)
    (apart,) = curvature.take(model, [1]).values()
    assert rows == [1] * len(TEXTS)
    assert close(apart, together, 1e-10)
