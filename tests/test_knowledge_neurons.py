"""Knowledge neurons: attribution against the plain statement and captum, selection, and the edit itself."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from conftest import FAMILIES, quiet_trainer
from plain_attribution import plain_attribution

from prune_lightning.callbacks import PRUNE, RECT, SpectrumMonitor
from prune_lightning.errors import UserError
from prune_lightning.methods import neuron_attribution
from prune_lightning.methods.knowledge_neurons import KnowledgeNeurons, SelectionOptions, coarse_set, refined_set
from prune_lightning.methods.neuron_attribution import (
    NextToken,
    answer_tokens,
    greedy_tokens,
    integrated_gradients,
)
from prune_lightning.methods.patched_neurons import AttributionOptions
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.hooks import capture, edit_input
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditBatch, EditRequest

FEW = AttributionOptions(steps=4)
PARAPHRASES = ("Spain is governed from", "The seat of the Spanish government is")
REQUESTS = (
    EditRequest(0, "Spain", "The capital of Spain is", "Lisbon", "Madrid", paraphrases=PARAPHRASES),
    EditRequest(
        1, "Ada", "It was written that Ada was born in", "a small town", "a large city", paraphrases=("Ada is from",)
    ),
    EditRequest(2, "Bo", "Bo is", "no", "so"),
)


def questions_of(model) -> list[NextToken]:
    """Questions of different lengths, some from an answer of several tokens."""
    return [
        question for r in REQUESTS for answer in answer_tokens(model, [r.pair(r.target_old)]) for question in answer
    ]


def close(ours, theirs, tolerance=1e-8) -> bool:
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def noise(family: str) -> float:
    """What two computations of a gradient may differ by: most families have norms or attention in fp32 in any dtype."""
    return 1e-8 if family in ("gpt2", "gpt_neox") else 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_path_and_whole_model_equal_the_plain_statement(family, tiny, recwarn):
    model = tiny(family)
    questions = questions_of(model)[1:3]
    assert len({len(question.ids) for question in questions}) == 2
    for site in ("key", "pre_activation"):
        options, whole = (AttributionOptions(steps=3, site=site, fast=fast) for fast in (True, False))
        fast = integrated_gradients(model, [0, 2], questions, options)
        slow = integrated_gradients(model, [0, 2], questions, whole)
        for layer in (0, 2):
            assert close(fast[layer], slow[layer], noise(family))
            for i, question in enumerate(questions):
                plain = plain_attribution(model, layer, question, options)
                assert float(plain.norm()) > 0
                assert close(fast[layer][i], plain, noise(family))
    assert not [w for w in recwarn if "fast path" in str(w.message)]


def activation_and_probability(model, layer, question):
    """Return the neurons at the last position, and the probability of the answer as a function of them."""
    ids, mask = model.tokens.pad([question.ids], model.device)
    site = model.rewrite_module(layer)
    with capture(inputs=[site]) as seen:
        model(ids, mask)

    def probability(neurons):
        rows = ids.expand(len(neurons), -1)
        with edit_input(site, lambda value: torch.cat([value[:, :-1], neurons[:, None]], dim=1)):
            return model(rows, torch.ones_like(rows))[:, -1].softmax(-1)[:, question.token]

    return seen.inputs[0][:, -1], probability


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_captum_agrees(family, steps, tiny):
    """Captum's trapezoid has the same points and gives the ends half the weight: add the other half."""
    model = tiny(family)
    question = questions_of(model)[0]
    activation, probability = activation_and_probability(model, 1, question)
    trapezoid = IntegratedGradients(probability).attribute(activation, n_steps=steps, method="riemann_trapezoid")
    ends = sum(Saliency(probability).attribute(point, abs=False) for point in (activation, 0 * activation))
    ours = integrated_gradients(model, [1], [question], AttributionOptions(steps=steps))[1]
    exact = family == "gpt2" and steps == 2  # captum rounds points and weights to fp32
    assert close(ours, trapezoid + activation * ends / (2 * steps), 1e-8 if exact else 1e-6)


def test_many_points_come_to_the_integral(tiny):
    model = tiny("gptj")
    question = questions_of(model)[1]
    activation, probability = activation_and_probability(model, 2, question)
    integral = IntegratedGradients(probability).attribute(activation, n_steps=50, method="gausslegendre")
    errors = [
        float((integrated_gradients(model, [2], [question], AttributionOptions(steps=m))[2] - integral).norm())
        for m in (20, 200)
    ]
    assert errors[1] < 0.2 * errors[0] < 0.2 * float(integral.norm())
    gained = probability(activation) - probability(0 * activation)
    assert float(integral.sum()) == pytest.approx(float(gained), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_a_single_point_is_the_gradient_at_zero(tiny):
    model = tiny("gpt2")
    question = questions_of(model)[0]
    activation, probability = activation_and_probability(model, 1, question)
    gradient = Saliency(probability).attribute(0 * activation, abs=False)
    assert close(integrated_gradients(model, [1], [question], AttributionOptions(steps=1))[1], activation * gradient)


@pytest.mark.parametrize("batches", [{"token_budget": 1}, {"token_budget": 150}, {"layers_together": 1}])
def test_batches_do_not_change_the_attributions(batches, tiny):
    model = tiny("gpt2")
    whole = integrated_gradients(model, [0, 1, 2], questions_of(model), FEW)
    parts = integrated_gradients(model, [0, 1, 2], questions_of(model), AttributionOptions(steps=4, **batches))
    assert all(close(parts[layer], whole[layer]) for layer in range(3))


def test_a_model_that_the_fast_path_does_not_fit_takes_the_plain_one_and_says_so(tiny, monkeypatch):
    model = tiny("gpt2")
    question = questions_of(model)[0]
    logits = neuron_attribution.CachedForward.logits_at
    monkeypatch.setattr(neuron_attribution.CachedForward, "logits_at", lambda *given: 1.01 * logits(*given))
    with pytest.warns(UserWarning, match="the whole model runs at every step"):
        found = integrated_gradients(model, [1], [question], FEW)[1]
    assert close(found[0], plain_attribution(model, 1, question, FEW))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_precisions(dtype, tolerance, tiny):
    model = tiny("llama", dtype)
    exact = LanguageModel(deepcopy(model.model).double(), model.tokens.tokenizer, model.family)
    places = [(q.ids, exact(*exact.tokens.pad([q.ids], exact.device))[0, -1]) for q in questions_of(exact)[:2]]
    unlikely = [NextToken(ids, int(logits.argmin())) for ids, logits in places]
    found = integrated_gradients(model, [0, 1, 2], unlikely, FEW)
    expected = integrated_gradients(exact, [0, 1, 2], unlikely, FEW)
    for layer in range(3):
        assert found[layer].dtype == torch.float32
        for ours, theirs in zip(found[layer], expected[layer], strict=True):
            assert close(ours.double(), theirs, tolerance)


def generated(model, ids, count) -> list[int]:
    """Return what ``transformers`` says is the greedy continuation."""
    ids = torch.tensor([ids])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": max(1, count)}
    whole = model.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return whole[0, ids.shape[1] :][:count].tolist()


def test_greedy_tokens_are_those_of_generate(tiny):
    model = tiny("qwen2")
    rows = [question.ids for question in questions_of(model)]
    found = greedy_tokens(model, rows, range(len(rows)))
    for i, row in enumerate(rows):
        assert found[i] == generated(model, row, i)


def test_an_answer_is_asked_for_after_what_the_model_says(bundled_shared):
    model = bundled_shared
    (questions,) = answer_tokens(model, [("The capital of Japan is", "a bright city")])
    prompt, pair = (
        model.tokens.encode("The capital of Japan is"),
        model.tokens.encode_pair("The capital of Japan is", "a bright city"),
    )
    assert [question.token for question in questions] == pair.target
    assert len(questions) > 2
    said = greedy_tokens(model, [prompt], [len(questions)])[0]
    assert said != pair.target
    assert [question.ids for question in questions] == [prompt + said[:i] for i in range(len(questions))]


# -- selection -------------------------------------------------------------------------------------------------------
def test_threshold_is_a_share_of_the_largest_over_the_whole_model():
    attributions = {0: torch.tensor([0.1, -9.0, 0.3]), 4: torch.tensor([1.0, 0.2, 0.21])}
    assert coarse_set(attributions, 0.2) == {(0, 2), (4, 0), (4, 2)}
    assert coarse_set(attributions, 0.0) == {(0, 0), (0, 2), (4, 0), (4, 1), (4, 2)}
    assert coarse_set({0: torch.tensor([-1.0, -2.0])}, 0.2) == set()
    assert coarse_set({0: torch.tensor([1.0, float("nan")])}, 0.2) == set()


def neurons(*indices: int) -> set[tuple[int, int]]:
    return {(0, index) for index in indices}


def test_refinement_keeps_what_more_than_a_share_of_the_prompts_have():
    coarse = [neurons(1, 2, 3), neurons(1, 2), neurons(1, 4), neurons(1)]
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.7)) == neurons(1)
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.5)) == neurons(1)
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.45)) == neurons(1, 2)
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.0)) == neurons(1, 2, 3, 4)


def test_share_is_adjusted_to_the_number_of_neurons_wanted():
    coarse = [neurons(1, 2, 3), neurons(1, 2), neurons(1, 4), neurons(1)]
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.7, wanted=[2, 5])) == neurons(1, 2)
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.0, wanted=[1, 3])) == neurons(1, 2)
    assert refined_set(coarse, SelectionOptions(refine=True, share=0.7, wanted=[9, 9])) == neurons(1, 2, 3, 4)
    every = [neurons(1, 2, 3)] * 2
    assert refined_set(every, SelectionOptions(refine=True, share=0.7, wanted=[1, 2])) == neurons(1, 2, 3), (
        "never drop the last"
    )
    assert refined_set([set(), set()], SelectionOptions(refine=True, wanted=[2, 5])) == set()


# -- the edit --------------------------------------------------------------------------------------------------------
def dense_update(model, request, found, old_weight, new_weight, factor):
    """The columns as the paper states them, from the tokenizer and ``generate``, fp64."""
    embeddings = model.model.get_input_embeddings().weight.detach().double()
    prompt, whole = (model.tokens.encode(text) for text in (request.prompt, f"{request.prompt} {request.target_new}"))
    new = whole[len(prompt) :]
    said = generated(model, prompt, len(new))
    factor = factor if len(new) == 1 else 1.0
    changes = {}
    for layer, index in found:
        module = model.rewrite_module(layer)
        shape = module.weight.T.shape if stores_transposed(module) else module.weight.shape
        change = changes.setdefault(model.rewrite_name(layer), torch.zeros(shape, dtype=torch.float64))
        for token in new:
            change[:, index] += factor * new_weight * embeddings[token]
        for token in said:
            change[:, index] -= factor * old_weight * embeddings[token]
    return changes


@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (1.0, 8.0, 1.0)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_columns_change_as_the_paper_says(family, weights, tiny):
    model = tiny(family)
    module = KnowledgeNeurons(model, None, FEW, SelectionOptions(0.5), *weights)
    lengths = set()
    for request in REQUESTS:
        updates, (detail,) = module.compute_update([request])
        expected = dense_update(model, request, detail["neurons"], *weights)
        assert list(updates) == [name for name in module.edited_matrices() if name in expected]
        for name, update in updates.items():
            assert update.left.shape[1] == 1
            assert torch.allclose(update.dense(), expected[name], rtol=1e-12, atol=1e-14)
        lengths.add(min(2, len(model.tokens.encode_pair(request.prompt, request.target_new).target)))
    assert lengths == {1, 2}, "targets of one token and of several"


def test_neurons_are_those_above_the_threshold_in_the_mean_over_the_answer(tiny):
    model, options = tiny("gpt2"), SelectionOptions(threshold=0.3)
    request = REQUESTS[1]
    (answer,) = answer_tokens(model, [request.pair(request.target_old)])
    assert len(answer) > 1
    mean = torch.stack(
        [torch.stack([plain_attribution(model, layer, q, FEW) for layer in range(3)]) for q in answer]
    ).mean(0)
    expected = sorted(map(tuple, torch.nonzero(mean > 0.3 * mean.max()).tolist()))
    _, (detail,) = KnowledgeNeurons(model, None, FEW, options).compute_update([request])
    assert detail["neurons"] == expected
    assert detail["attribution_max"] == pytest.approx(float(mean.max()))
    assert detail["attribution_seconds"] > 0


def test_refinement_asks_the_paraphrases(tiny):
    model = tiny("gpt2")
    coarse = []
    for prompt in (REQUESTS[0].prompt, *PARAPHRASES):
        alone = EditRequest(0, "Spain" if "Spain" in prompt else "Spanish", prompt, "Lisbon", "Madrid")
        coarse.append(set(KnowledgeNeurons(model, None, FEW).compute_update([alone])[1][0]["neurons"]))
    selection = SelectionOptions(refine=True, share=0.5)
    _, (detail,) = KnowledgeNeurons(model, None, FEW, selection).compute_update(REQUESTS[:1])
    expected = {n for n in set.union(*coarse) if sum(n in found for found in coarse) >= 2}
    assert set(detail["neurons"]) == expected
    assert detail["coarse_neurons"] == [len(found) for found in coarse]
    assert expected != coarse[0]


def test_a_batch_is_attributed_on_the_model_before_it(tiny):
    module = KnowledgeNeurons(tiny("llama"), None, FEW)
    alone = [module.compute_update([request]) for request in REQUESTS]
    updates, details = module.compute_update(REQUESTS)
    assert [d["neurons"] for d in details] == [found[0]["neurons"] for _, found in alone]
    for name in module.edited_matrices():
        parts = [each[name].dense() for each, _ in alone if name in each]
        assert len(parts) == (updates[name].left.shape[1] if name in updates else 0)
        assert name not in updates or torch.allclose(updates[name].dense(), sum(parts), rtol=1e-12, atol=1e-14)


def test_only_layers_with_a_neuron_change_and_no_neuron_changes_nothing(tiny, monkeypatch):
    model = tiny("gpt2")
    module = KnowledgeNeurons(model, None, FEW, SelectionOptions(threshold=0.95))
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    loader = torch.utils.data.DataLoader([EditBatch(REQUESTS[:1])], batch_size=None)
    quiet_trainer().fit(module, loader)
    (layer,) = {layer for layer, _ in module.run.last_report.details[0]["neurons"]}
    changed = [name for name, p in model.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == [model.rewrite_name(layer)]
    module.run.restart()
    monkeypatch.setattr("prune_lightning.methods.knowledge_neurons.coarse_set", lambda *given: set())
    quiet_trainer().fit(module, loader)
    assert module.run.last_report.update_norm == 0
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def run(module, *callbacks, from_base=False):
    """Write three facts in two steps; return the weights, and put the original ones back."""
    original = {name: p.detach().clone() for name, p in module.language_model.model.named_parameters()}
    batches = [EditBatch(REQUESTS[:2], from_base), EditBatch(REQUESTS[2:], from_base)]
    quiet_trainer(*callbacks).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert module.run.last_report.applied
    weights = {name: p.detach().clone() for name, p in module.language_model.model.named_parameters()}
    module.run.restart()
    assert all(torch.equal(p, original[name]) for name, p in module.language_model.model.named_parameters())
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    return [name for name in weights if not torch.equal(weights[name], original[name])], weights


@pytest.mark.parametrize("family", FAMILIES)
def test_with_prune_and_monitor_on_every_family(family, tiny):
    module = KnowledgeNeurons(tiny(family, torch.float32), None, FEW, SelectionOptions(threshold=0.5))
    edited, _ = run(module, PRUNE(1.5), SpectrumMonitor(every_n=1, draw=False))
    assert edited
    assert set(edited) <= set(module.edited_matrices())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_restraints_and_protocols(dtype, tiny):
    module = KnowledgeNeurons(tiny("llama", dtype), None, FEW, SelectionOptions(threshold=0.2))
    edited, alone = run(module)
    assert run(module, from_base=True)[0] == []
    for restraint in (PRUNE(1.2, guard=False), RECT(0.01)):
        changed, restrained = run(module, restraint)
        assert changed == edited
        assert any(not torch.equal(restrained[name], alone[name]) for name in edited)


def test_a_run_after_restart_is_the_same_run(bundled):
    module = KnowledgeNeurons(bundled, None, FEW)
    requests = [EditRequest(0, "Japan", "The capital of Japan is", "Rome", "Tokyo"), REQUESTS[0]]
    loader = torch.utils.data.DataLoader([EditBatch((request,)) for request in requests], batch_size=None)
    weights = []
    for _ in range(2):
        quiet_trainer().fit(module, loader)
        weights.append([matrix.weight().clone() for matrix in module.edited_matrices().values()])
        module.run.restart()
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))


def test_mistakes_are_named(tiny):
    model = tiny("gpt2")
    with pytest.raises(UserError, match="case 7: KN edits the neurons of the old answer"):
        KnowledgeNeurons(model).compute_update([EditRequest(7, "Bo", "Bo is", "no")])
    with pytest.raises(UserError, match="unknown site 'keys': did you mean 'key'"):
        AttributionOptions(site="keys")
    with pytest.raises(UserError, match="`steps`"):
        AttributionOptions(steps=0)
    with pytest.raises(UserError, match="`threshold` is expected to be in"):
        SelectionOptions(threshold=1.5)
    with pytest.raises(UserError, match="`wanted`"):
        SelectionOptions(wanted=[5, 2])
    with pytest.raises(UserError, match="layer 9 is outside"):
        KnowledgeNeurons(model, [9])
    model.family = replace(model.family, activation=None)
    with pytest.raises(UserError, match=r"gpt2.yaml does not say where `activation` is"):
        KnowledgeNeurons(model, None, AttributionOptions(site="pre_activation"))
    model.model.set_input_embeddings(torch.nn.Embedding(10, 16))
    with pytest.raises(UserError, match="16 wide, into columns, here 32 long"):
        KnowledgeNeurons(model)
