"""SERAC: its loss, its routing and what it answers against plain fp64 statements of them."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from conftest import FAMILIES, ROOT, quiet_trainer
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from test_configs import compose

from prune_lightning.data.bundled import BundledEditorTraining, BundledWorld
from prune_lightning.data.editor_training import EditorTrainingData
from prune_lightning.data.hard_negatives import HardNegatives
from prune_lightning.errors import UserError
from prune_lightning.evaluation.counterfact import CounterFactScores
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.scoring import score_encoded, token_nll
from prune_lightning.methods.retrieval import SharedWords
from prune_lightning.methods.serac import SERAC
from prune_lightning.methods.serac_networks import NetworkShapes, ScopeClassifier
from prune_lightning.methods.serac_training import SERACTraining, TrainingOptions, read_prompts
from prune_lightning.metrics import CounterFactScore
from prune_lightning.types import EditRequest, MetaExample

SHAPES = NetworkShapes(embedding=8, width=16, layers=1, heads=2)
FACTS = [
    EditRequest(0, "Japan", "The capital of Japan is", "Rome"),
    EditRequest(1, "Italy", "The capital of Italy is", "a tall river"),
    EditRequest(2, "Claude Monet", "By profession, Claude Monet was a", "chemist"),
]
EXAMPLES = [
    MetaExample(
        ((request.prompt, request.target_new),),
        ((f"They told me that {request.prompt}", request.target_new),),
        (),
        (f"The sea near {request.subject} is", "No news."),
    )
    for request in FACTS
]
PROMPTS = [*(f.prompt for f in FACTS), "They told me that the capital of Japan is", "A dog", "In the morning they"]


def editor(model, *requests, layers=(1,), size=1, **options) -> SERAC:
    torch.manual_seed(1)
    options = {"path": None, "networks": SHAPES} | options
    module = SERAC(language_model=model, layers=layers, **options)
    if options["path"] is None:  # moments as training leaves them, and a counterfactual model that says something
        rows = model.tokens.encode_all([*PROMPTS, "The old king saw the river", "No news.", "It is a tall cat"])
        module.networks.classifier.moments.update(read_prompts(model, layers[0], rows))
        with torch.no_grad():
            for parameter in module.networks.counterfactual.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
    for begin in range(0, len(requests), size):
        module.edit(requests[begin : begin + size])
        module.run.settle()
    return module


def states(model, layer: int, ids: list[int]) -> torch.Tensor:
    """Return a block's output for one row, in fp64."""
    seen = []
    handle = model.block(layer).register_forward_hook(
        lambda m, a, out: seen.append(out[0] if type(out) is tuple else out)
    )
    with torch.no_grad():
        model.model(torch.tensor([ids]))
    handle.remove()
    return seen[0].view(len(ids), -1).double()


def plain_embedding(module: SERAC, ids: list[int]) -> torch.Tensor:
    classifier = module.networks.classifier
    hidden, moments = states(module.language_model, module.layers[0], ids), classifier.moments
    features = torch.cat([sum(hidden) / len(hidden), hidden[-1]])
    sigma = (moments.squares / (moments.count - 1)).sqrt() + 1e-7
    return classifier.projection.weight.detach().double() @ ((features - moments.mean) / sigma)


def plain_answer(module: SERAC, prompt: list[int], answer: list[int], stored: list[int]) -> torch.Tensor:
    """Return the log-probabilities of each token of an answer, asked behind a stored edit, one row by itself."""
    h = module.networks.counterfactual.answering.model
    row = [*stored, *prompt[1:], *answer]  # the shipped tokenizer begins every text with its only special token
    with torch.no_grad():
        log_p = h(torch.tensor([row])).logits[0].double().log_softmax(-1)
    begin = len(stored) + len(prompt) - 2
    return log_p[begin : begin + len(answer)]


def stored(model, prompt: str, target: str) -> list[int]:
    pair = model.tokens.encode_pair(prompt, target)
    return [*pair.ids[: pair.target_start], 0, *pair.target, 0]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_loss_equals_the_plain_one(family, tiny):
    model = tiny(family)
    module = editor(model)
    module.networks.double()
    training = SERACTraining(model, 1, module.networks, TrainingOptions(edit_weight=0.3)).eval()
    losses = training.losses(EXAMPLES)
    answers, inside, outside = [], [], []
    for example in EXAMPLES:
        ((prompt, target),), (rephrased,) = example.edits, example.rephrased
        e_z = plain_embedding(module, model.tokens.encode(prompt))
        inside.append((plain_embedding(module, model.tokens.encode(rephrased[0])) - e_z).square().sum())
        for text in example.unrelated:
            s = math.exp(-float((plain_embedding(module, model.tokens.encode(text)) - e_z).square().sum()))
            outside.append(-math.log(1 - s))
        pair = model.tokens.encode_pair(*rephrased)
        answer = [*pair.target, 0]
        log_p = plain_answer(module, pair.ids[: pair.target_start], answer, stored(model, prompt, target))
        answers.append(-sum(log_p[i, token] for i, token in enumerate(answer)) / len(answer))
    found = {name: float(getattr(losses, name).detach()) for name in ("answer", "inside", "outside")}
    exact = {"gptj": 1e-5}.get(family, 1e-7)  # its attention, and llama's norms, are fp32 whatever the model's dtype
    assert found["answer"] == pytest.approx(float(sum(answers)) / 3, rel=1e-6)  # llama's norms and turns are fp32
    assert found["inside"] == pytest.approx(float(sum(inside)) / 3, rel=exact)
    assert found["outside"] == pytest.approx(sum(outside) / 6, rel=100 * exact)
    total = training.measured(EXAMPLES)["loss"]
    assert float(total.detach()) == pytest.approx(0.3 * found["answer"] + found["inside"] + found["outside"])
    total.backward()
    assert all(float(p.grad.norm()) > 0 for p in module.networks.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_pretrained_counterfactual_model_keeps_the_published_rate():
    assert [TrainingOptions().answering_rate(pretrained) for pretrained in (True, False)] == [1e-5, 2e-3]
    assert TrainingOptions(learning_rate=3e-4).answering_rate(pretrained=True) == 3e-4


def test_unrelated_prompts_begin_at_a_distance_of_one():
    torch.manual_seed(0)
    classifier = ScopeClassifier(400, 64)
    rows = classifier(torch.randn(200, 400) * 3 + 5)  # in training mode: standardised by their own moments
    assert float((rows[:100] - rows[100:]).square().sum(-1).mean()) == pytest.approx(1.0, rel=0.1)
    count = float(classifier.moments.count)
    classifier.eval()(torch.randn(5, 400))
    assert float(classifier.moments.count) == count == 200


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_and_answers_are_those_of_dense_distances(family, tiny):
    """Batched and padded rows against one row at a time: what is in scope, and what is answered."""
    model = tiny(family)
    module = editor(model, *FACTS)
    ids = model.tokens.encode_all(PROMPTS)
    keys = torch.stack([plain_embedding(module, model.tokens.encode(fact.prompt)) for fact in FACTS])
    distances = torch.stack([(plain_embedding(module, row) - keys).square().sum(1) for row in ids])
    assert torch.allclose(module.side.keys.double(), keys, rtol=1e-4, atol=1e-5)
    nearest, log_s = distances.argmin(1), -distances.min(1).values
    module.side.threshold = float(log_s[3:].exp().sort().values[-2:].mean())  # between two of those that are not edited
    inside = log_s.exp() > module.side.threshold
    assert inside[:3].all()
    assert 0 < int(inside[3:].sum()) < 3
    pairs = [model.tokens.encode_pair(prompt, answer) for prompt in PROMPTS for answer in ("Rome", "a tall river")]
    found = score_encoded(model, pairs)
    with module.unedited():
        unedited = score_encoded(model, pairs)
    for i, pair in enumerate(pairs):
        prompt, answer = pair.ids[: pair.target_start], pair.target
        if not inside[i // 2]:
            assert torch.allclose(found.nll[i], unedited.nll[i], rtol=1e-5)
            continue
        fact = FACTS[int(nearest[i // 2])]
        log_p = plain_answer(module, prompt, answer, stored(model, fact.prompt, fact.target_new))
        expected = -sum(log_p[k, token] for k, token in enumerate(answer)) / len(answer)
        assert float(found.nll[i]) == pytest.approx(float(expected), rel=1e-4)
        assert found.predicted[i, : len(answer)].tolist() == log_p.argmax(-1).tolist()


def test_a_decision_holds_for_the_whole_answer(tiny):
    """Cached generation, token by token, against the counterfactual model by itself."""
    model = tiny("llama")
    module = editor(model, *FACTS)
    ids = model.tokens.encode_all([FACTS[1].prompt, FACTS[0].prompt])
    for prompt, fact, said in zip(ids, (FACTS[1], FACTS[0]), decode(model, ids, [6, 6]), strict=True):
        answer: list[int] = []
        for token in said.ids:
            log_p = plain_answer(module, prompt, [*answer, token], stored(model, fact.prompt, fact.target_new))
            assert int(log_p[-1].argmax()) == token
            answer.append(token)
        assert (
            len(answer) == 6
            or plain_answer(module, prompt, [*answer, 0], stored(model, fact.prompt, fact.target_new))[-1].argmax() == 0
        ), "it ends with the end token only"


def test_a_whole_text_counts_as_one_prompt(tiny):
    model = tiny("gpt2")
    module = editor(model, FACTS[0])
    nll, count = token_nll(model, [FACTS[0].prompt, "A dog"])
    ids = model.tokens.encode(FACTS[0].prompt)
    log_p = plain_answer(module, ids[:1], ids[1:], stored(model, FACTS[0].prompt, "Rome"))
    assert float(nll[0]) == pytest.approx(-float(sum(log_p[i, token] for i, token in enumerate(ids[1:]))), rel=1e-5)
    assert int(count[0]) == len(ids) - 1


def test_a_later_target_takes_the_place_of_the_earlier(tiny):
    model = tiny("llama")
    later = EditRequest(3, "Japan", "The capital of Japan is", "Bern")
    module = editor(model, FACTS[0], FACTS[1], later)
    expected = editor(tiny("llama"), FACTS[1], later).side.state_dict()
    found = module.side.state_dict()
    assert torch.equal(found["tokens"], expected["tokens"])
    assert torch.allclose(found["keys"], expected["keys"], atol=1e-6)
    again = editor(tiny("llama"), FACTS[0], later, FACTS[1], size=3).side
    assert [entry.target for entry in again.entries] == [entry.target for entry in module.side.entries[::-1]]


def test_a_prompt_that_is_too_long_keeps_the_edit_and_loses_its_beginning(tiny):
    model = tiny("gpt2")
    module = editor(model, FACTS[0])
    counterfactual, entry = module.networks.counterfactual, module.side.entries[0]
    counterfactual.answering.tokens.max_length = 20
    before = stored(model, FACTS[0].prompt, "Rome")
    row, moved = counterfactual.behind(entry, list(range(100, 160)))
    assert row == [*before, *range(160 - (20 - len(before)), 160)]
    assert row[20 - 1] == range(100, 160)[20 - 1 - moved]
    assert counterfactual.behind(entry, [0, 7]) == ([*before, 7], len(before) - 1)


# -- training ---------------------------------------------------------------------------------------------------------
def training_data(**options) -> EditorTrainingData:
    train = BundledEditorTraining("train", num_edits=40)
    validation = BundledEditorTraining("validation", num_edits=4)
    return EditorTrainingData(train, validation, steps=2, batch_size=2, **options)


def training_of(model) -> SERACTraining:
    torch.manual_seed(3)
    module = SERAC(
        language_model=model, layers=[3], path=None, networks=SHAPES, training=TrainingOptions(0.1, 1e-3, 1e-3)
    )
    return module.training_module()


def fit(module: SERACTraining, epochs: int, *callbacks, ckpt_path=None, **kwargs) -> None:
    settings = {"max_epochs": epochs, "inference_mode": False, "gradient_clip_val": 100, "num_sanity_val_steps": 0}
    quiet_trainer(*callbacks, **(settings | kwargs)).fit(module, datamodule=training_data(), ckpt_path=ckpt_path)


def test_training_trains_both_networks_resumes_and_leaves_the_model(bundled, tmp_path):
    weights = {name: parameter.detach().clone() for name, parameter in bundled.named_parameters()}
    whole = training_of(bundled)
    before = {name: parameter.detach().clone() for name, parameter in whole.network.named_parameters()}
    fit(whole, 2)
    assert all(not torch.equal(before[name], parameter) for name, parameter in whole.network.named_parameters())
    fit(
        training_of(bundled),
        1,
        ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True),
        enable_checkpointing=True,
    )
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("network.") for name in kept)
    resumed = training_of(bundled)
    fit(resumed, 2, ckpt_path=tmp_path / "last.ckpt")
    state = resumed.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.network.state_dict().items())
    assert all(torch.equal(weights[name], parameter) for name, parameter in bundled.named_parameters())


def test_unrelated_prompts_are_the_probes_as_they_are_asked():
    data = training_data(probes=2)
    data.setup()
    plain = data._examples("train")
    for i in range(5):
        example = plain[i]
        assert len(example.unrelated) == len(example.locality) == 2
        assert all(
            text.startswith(f"{asked} ") for asked, text in zip(example.unrelated, example.locality, strict=True)
        )


def test_hard_negatives_are_the_ranked_neighbours_of_other_facts():
    words = [
        "lies in the country of",
        "lies near a country of",
        "can be seen in",
        "is a town of the old country of",
    ] * 2
    requests = [EditRequest(i, f"Town{i}", f"Town{i} {words[i]}", "Peru", f"Land{i}") for i in range(8)]
    requests += [EditRequest(9, "Town0", "The country of Town0 is", "Peru", "Land0")]
    similarity = SharedWords()
    hard = HardNegatives(similarity, first=2, last=4, temperature=0.5, share=1.0)
    hard.gather([*requests, *requests])
    query = similarity.read(requests[0].prompt)
    close = {r.prompt: similarity.compare(query, [similarity.read(r.prompt)])[0] for r in requests[1:8]}
    expected = sorted(close.items(), key=lambda each: -each[1])[1:4]
    found = hard.neighbours(requests[0])
    assert [close for _, close in found] == pytest.approx([close for _, close in expected])
    assert not {prompt for prompt, _ in found} & {requests[0].prompt, requests[8].prompt}
    rng = random.Random(0)
    drawn = [hard.draw(requests[0], rng) for _ in range(300)]
    weights = [math.exp(c / 0.5) for _, c in found]
    for (prompt, _), weight in zip(found, weights, strict=True):
        assert drawn.count(prompt) / 300 == pytest.approx(weight / sum(weights), abs=0.1)  # three deviations
    assert HardNegatives(similarity, share=0.0).draw(requests[0], rng) is None
    with pytest.raises(UserError, match="below"):
        HardNegatives(similarity, first=5, last=4)


def test_hard_negatives_take_a_probes_place_in_training_alone():
    hard = HardNegatives(SharedWords(), share=1.0)
    data, plain = training_data(hard_negatives=hard, probes=2), training_data(probes=2)
    data.setup(), plain.setup()
    for i in range(3):
        one, other = data._examples("train")[i], plain._examples("train")[i]
        assert (one.edits, one.rephrased, one.locality) == (other.edits, other.rephrased, other.locality)
        assert one.unrelated[1:] == other.unrelated[1:]
        assert one.unrelated[0] in {prompt for r in data.streams["train"].requests for prompt in [r.prompt]}
        assert data._examples("validation")[i] == plain._examples("validation")[i]


# -- the networks on disk ---------------------------------------------------------------------------------------------
def test_networks_are_read_back_as_they_were_written(tmp_path, tiny):
    model = tiny("llama", torch.float32)
    module = editor(model)
    module.save_trained(tmp_path, {"steps": 3}, torch.float32)
    again = editor(model, path=str(tmp_path))
    expected, found = module.networks.state_dict(), again.networks.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert expected.keys() == found.keys()


@pytest.mark.parametrize(
    ("case", "said"),
    [("missing", "no serac"), ("damaged", "damaged"), ("layer", "layer 1"), ("model", "another model")],
)
def test_wrong_networks_are_refused_in_one_line(case, said, tmp_path, tiny):
    model = tiny("llama", torch.float32)
    editor(model).save_trained(tmp_path, {}, torch.float32)
    if case == "missing":
        (tmp_path / "serac.safetensors").unlink()
    if case == "damaged":
        (tmp_path / "serac.safetensors").write_bytes(b"nothing")
    if case == "model":
        with torch.no_grad():
            model.rewrite_module(1).weight.mul_(1.05)
    with pytest.raises(UserError, match=f"method.path: .*{said}.*experiment=train_serac") as refused:
        editor(model, path=str(tmp_path), layers=[2] if case == "layer" else [1])
    assert "\n" not in str(refused.value)


def test_another_vocabulary_is_refused(tiny, tmp_path):
    other = tiny("gpt2", torch.float32, vocab_size=3000)
    other.model.save_pretrained(tmp_path)
    other.tokens.tokenizer.save_pretrained(tmp_path)
    shapes = NetworkShapes(start=str(tmp_path))
    with pytest.raises(UserError, match="3000 tokens"):
        editor(tiny("llama"), networks=shapes)
    fitting = tiny("gpt2", torch.float32)
    fitting.model.save_pretrained(tmp_path)
    module = SERAC(language_model=tiny("llama"), layers=[1], path=None, networks=shapes)
    started = module.networks.counterfactual.answering.state_dict()
    assert all(torch.equal(value, started[name]) for name, value in fitting.state_dict().items())


def test_untrained_networks_give_a_warning(tiny):
    with pytest.warns(UserWarning, match="experiment=train_serac"):
        editor(tiny("llama")).prepare()


# -- the networks that are shipped ------------------------------------------------------------------------------------
def test_shipped_networks_edit_facts_they_were_not_trained_on(bundled):
    module = instantiate(compose("method=serac").method, language_model=bundled, _convert_="all")
    stream = BundledWorld(num_edits=30, protocol="sequential", seed=7)
    stream.setup()
    module.edit(stream.requests)
    module.run.settle()
    metric = CounterFactScore()
    CounterFactScores().update(metric, bundled, dict(enumerate(stream.requests)))
    scores = metric.compute()
    assert scores["efficacy_score"] >= 0.95
    assert scores["efficacy_accuracy"] >= 0.7  # the counterfactual model does not copy every rare target
    assert scores["generalization_score"] >= 0.7
    assert scores["locality_accuracy"] >= 0.95


def test_shipped_description_is_small_and_complete():
    folder = ROOT / "prune_lightning" / "bundled" / "serac"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5e6
    description = json.loads((folder / "serac.json").read_text())
    assert description["training"]["editor_data"]["train"]["part"] == "train"
    assert description["training"]["scores"]["val/kept_inside"] > 0.9
