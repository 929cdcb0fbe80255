"""ELDER against a dense computation in fp64 that takes nothing from the package, and its codes by hand."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from prune_lightning.errors import UserError
from prune_lightning.methods.elder import ELDER
from prune_lightning.methods.expert_codes import allocate, chosen, experts_for, hamming, label, number_of_codes
from prune_lightning.methods.expert_distances import distance_facts
from prune_lightning.methods.retrieval import general_sentences
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.family import stores_transposed
from prune_lightning.types import EditRequest

FACTS = [("Japan", "Rome"), ("Italy", "a tall river"), ("France", "Oslo")]
REQUESTS = [EditRequest(i, name, f"The capital of {name} is", new) for i, (name, new) in enumerate(FACTS)]
OTHERS = ["A dog", "The old king saw the river and", "By profession, Claude Monet was a"]
PREFIXES = ("", "The river. ")
LAYERS, NUMBER, ACTIVE, RANK, ALPHA, STEPS, RATE, GUIDANCE = [1, 2], 5, 2, 3, 6.0, 4, 0.02, 0.3


def build(model, **options):
    settings = {"layers": LAYERS, "experts": NUMBER, "rank": RANK, "alpha": ALPHA, "steps": STEPS}
    settings |= {"learning_rate": RATE, "guidance": GUIDANCE, "contexts": ContextOptions(fixed=PREFIXES[1:])}
    module = ELDER(language_model=model, **(settings | options))
    module.prepare()
    return module


def edited(model, requests=REQUESTS, **options):
    module = build(model, **options)
    reports = []
    for request in requests:
        reports.append(module.edit([request]))
        module.run.settle()
    return module, reports


class Dense:
    """The method as the paper states it: whole matrices per expert, one row at a time, the whole model."""

    def __init__(self, model, experts):
        self.model = model
        self.hosts = [model.rewrite_module(layer) for layer in LAYERS]
        self.below = model.rewrite_module(LAYERS[0] - 1)
        self.down = [[block.clone() for block in of_layer.split(RANK)] for of_layer in experts.down]
        self.up = [[block.clone() for block in of_layer.split(RANK, 1)] for of_layer in experts.up]
        self.routers = [router.clone() for router in experts.routers]
        self.parameters = [*(t for one in (*self.down, *self.up) for t in one), *self.routers]

    def query(self, ids):
        found = []
        handle = self.below.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            self.model.model(torch.tensor([ids]))
        handle.remove()
        return found[0].reshape(len(ids), -1)[-1]

    def scores(self, query):
        return [torch.softmax(router @ query, 0) for router in self.routers]

    def code(self, query):
        return [sorted(s.argsort(descending=True)[:ACTIVE].tolist()) for s in self.scores(query)]

    def logits(self, ids, query, answered=True):
        """Return all logits; each host has the weight `W + sum_i s_i alpha / r B_i A_i` instead of its own."""
        handles, scores, code = [], self.scores(query), self.code(query)
        for number, host in enumerate(self.hosts if answered else ()):
            change = sum(
                scores[number][i] * (ALPHA / RANK) * self.up[number][i] @ self.down[number][i] for i in code[number]
            )
            weight = (host.weight.T if stores_transposed(host) else host.weight) + change

            def replaced(module, args, output, weight=weight):
                return args[0] @ weight.T + (0 if module.bias is None else module.bias)

            handles.append(host.register_forward_hook(replaced))
        try:
            return self.model.model(torch.tensor([ids])).logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def train(self, request, allocation):
        """Train one fact and return the loss before each step."""
        tokens = self.model.tokens
        pairs = tokens.encode_pairs([request.behind(each, tokens.own_start(request.prompt))[0] for each in PREFIXES])
        queries = [self.query(pair.ids[: pair.target_start]) for pair in pairs]
        for tensor in self.parameters:
            tensor.requires_grad_()
        optimizer, history = torch.optim.Adam(self.parameters, lr=RATE), []
        for _ in range(STEPS):
            rows = []
            for pair, query in zip(pairs, queries, strict=True):
                log_p = self.logits(pair.ids, query).log_softmax(-1)
                places = range(pair.target_start, len(pair.ids))
                target = -sum(log_p[place - 1, pair.ids[place]] for place in places) / len(places)
                scores = self.scores(query)
                guide = -sum(scores[number][j].log() for number, one in enumerate(allocation) for j in one)
                rows.append(target + GUIDANCE * guide)
            loss = sum(rows) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            for tensor in self.parameters:  # experts that no row has chosen; Adam counts the step for them, too
                tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            optimizer.step()
            history.append(float(loss.detach()))
        for tensor in self.parameters:
            tensor.requires_grad_(False)
        return history


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_codes_and_answers_are_those_of_a_dense_computation(family, tiny):
    """To rounding in fp64: Adam divides by the size of a gradient, and adds 1e-8 to it."""
    model = tiny(family)
    module = build(model)
    dense, experts = Dense(model, module.side.experts), module.side
    queries, entries = [], []
    for request in REQUESTS:
        report = module.edit([request])
        module.run.settle()
        with module.unedited():
            losses = dense.train(request, experts.allocations[-1].tolist())
            queries.append(dense.query(model.tokens.encode(request.prompt)))
        assert report.details[0]["losses"] == pytest.approx(losses, rel=1e-9)
        entries.append(dense.code(queries[-1]))
        assert torch.equal(experts.codes[-1], chosen(torch.tensor(entries[-1]), NUMBER))
    ours = [*(t for one in experts.experts.down for t in one.split(RANK))]
    ours += [*(t for one in experts.experts.up for t in one.split(RANK, 1)), *experts.experts.routers]
    for tensor, expected in zip(ours, dense.parameters, strict=True):
        assert torch.allclose(tensor, expected, rtol=1e-8, atol=1e-10)

    now = [dense.code(query) for query in queries]  # the routers have moved
    assert torch.equal(experts.table, torch.stack([chosen(torch.tensor(code), NUMBER) for code in now]))
    for epsilon in (0.0, 2.0, 6.0, 9.0):
        experts.routing = type(experts.routing)(ACTIVE, epsilon, False, True)
        for prompt in [*(request.prompt for request in REQUESTS), *OTHERS]:
            ids = model.tokens.encode(prompt)
            with torch.no_grad(), module.unedited():
                query = dense.query(ids)
                nearest = min(apart(dense.code(query), code) for code in now)
                expected = dense.logits(ids, query, answered=nearest < epsilon)[-1]
            with torch.no_grad():
                found = model.model(torch.tensor([ids])).logits[0, -1]
            assert torch.allclose(found, expected, rtol=1e-8, atol=1e-9)
            assert bool(experts.held.any()) == (nearest < epsilon)


def apart(code, other):
    """Return the Hamming distance of two codes, as sets of (layer, expert)."""
    one, two = ({(layer, i) for layer, of_layer in enumerate(each) for i in of_layer} for each in (code, other))
    return len(one ^ two)


def test_hamming_distances_are_those_of_the_sets():
    numbers = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[2, 3], [0, 1]]])
    codes = chosen(numbers, 4)
    expected = [[apart(one, other) for other in numbers.tolist()] for one in numbers.tolist()]
    assert hamming(codes, codes).tolist() == expected == [[0, 2, 8], [2, 0, 6], [8, 6, 0]]


def test_every_fact_gets_experts_of_its_own_as_long_as_there_are_some():
    """Two layers of four experts have 36 codes. The 37th fact gets one for the second time."""
    shape, labels, known = (2, 4, 2), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 2, dtype=torch.int16)
    for number in range(72):
        found = allocate([number], labels, known, shape, seed=0)
        labels, known = torch.cat([labels, torch.tensor([number])]), torch.cat([known, found])
        if number == 35:
            every = product(combinations(range(4), 2), repeat=2)
            assert sorted(map(str, known.tolist())) == sorted(str([list(a), list(b)]) for a, b in every)
    assert sorted(map(str, known[:36].tolist())) == sorted(map(str, known[36:].tolist()))
    assert torch.equal(allocate([5, 7], labels, known, shape, seed=1), known[[5, 7]]), "a known fact keeps its own"
    one, other, same = allocate([1, 2, 1], labels[:0], known[:0], shape, seed=0)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (number_of_codes(*shape), experts_for(6, 2), experts_for(3, 2), experts_for(2, 2)) == (36, 4, 9, 16)
    assert label("a") != label("b")


def test_facts_with_one_target_share_experts_if_they_are_told_to(tiny):
    requests = [REQUESTS[0], EditRequest(7, "Spain", "The capital of Spain is", "Rome"), REQUESTS[2]]
    first, second, third = edited(tiny("gpt2"), requests, allocation="target")[0].side.allocations
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    first, second, _ = edited(tiny("gpt2"), requests)[0].side.allocations
    assert not torch.equal(first, second)


def test_prompts_that_are_deferred_have_the_models_own_bits(tiny):
    model = tiny("gpt2")
    module, _ = edited(model, epsilon=0.0)
    ids = [model.tokens.encode(prompt) for prompt in [REQUESTS[0].prompt, *OTHERS]]

    def answers():
        with torch.no_grad():
            return [model.model(torch.tensor([each])).logits for each in ids]

    found = answers()
    with module.unedited():
        assert all(torch.equal(a, b) for a, b in zip(found, answers(), strict=True))


def test_codes_are_computed_again_or_kept(tiny):
    module, _ = edited(tiny("gpt2"), learning_rate=0.3)
    side = module.side
    assert torch.equal(side.table, side.present())
    moved = hamming(side.present(), side.codes).diagonal()
    assert moved[-1] == 0, "the last one was coded by the present routers"
    assert moved.any(), "at this learning rate the routers have moved"
    kept, _ = edited(tiny("gpt2"), learning_rate=0.3, reencode=False)
    assert torch.equal(kept.side.table, side.codes)
    facts = module.summary()["method_facts"]
    assert facts["codes_moved"] == float(moved.double().mean())
    assert facts["codes_lost"] == float((moved >= module.routing.epsilon).double().mean())


@pytest.mark.parametrize(("active", "number"), [(1, 2), (2, 3), (2, 5), (3, 5), (4, 5)])
def test_epsilon_is_half_of_the_largest_distance(active, number, tiny):
    codes = [torch.zeros(number).index_fill(0, torch.tensor(c), 1) for c in combinations(range(number), active)]
    largest = 2 * max(int((one != other).sum()) for one in codes for other in codes)
    assert build(tiny("gpt2"), active=active, experts=number).routing.epsilon == largest / 2


@pytest.mark.parametrize("number", [1, 2])
def test_experts_that_all_answer_cannot_tell_prompts_apart(number, tiny):
    with pytest.raises(UserError, match=r"method.experts has to be larger"):
        build(tiny("gpt2"), active=2, experts=number)


def test_the_distances_of_unrelated_text_are_counted(tiny):
    model = tiny("llama")
    module, _ = edited(model, epsilon=3.0)
    dense = Dense(model, module.side.experts)
    with module.unedited():
        known = [dense.code(dense.query(model.tokens.encode(request.prompt))) for request in REQUESTS]
        texts = [sentence.rpartition(" ")[0] for sentence in general_sentences()]
        codes = [dense.code(dense.query(model.tokens.encode(text)[: model.tokens.max_length])) for text in texts]
    nearest = sorted(min(apart(code, other) for other in known) for code in codes)
    facts = distance_facts(module.side)
    assert facts["distance_unrelated"] == {str(d): nearest.count(d) for d in sorted(set(nearest))}
    assert facts["answered_unrelated"] == pytest.approx(sum(d < 3 for d in nearest) / len(nearest))
    assert facts["distance_unrelated_median"] == torch.tensor(nearest, dtype=torch.double).quantile(0.5)
    assert facts["codes"] == 100


def test_mean_queries_are_taken_off(tiny):
    model = tiny("gpt2")
    side = build(model, center=True).side
    dense = Dense(model, side.experts)
    texts = [sentence.rpartition(" ")[0] for sentence in general_sentences()]
    mean = torch.stack([dense.query(model.tokens.encode(text)[: model.tokens.max_length]) for text in texts]).mean(0)
    inputs = torch.randn(1, 3, 32, dtype=torch.float64)
    assert torch.allclose(side.read(inputs, torch.tensor([1]))[0], inputs[0, 1] - mean)


def test_only_the_facts_own_experts_are_trained_if_the_route_is_hard(tiny):
    module, _ = edited(tiny("gpt2"), REQUESTS[:1], route="hard")
    untrained = build(tiny("gpt2")).side.experts
    meant = chosen(module.side.allocations[0], NUMBER)
    for layer in range(2):
        ours, before = (e.up[layer].split(RANK, 1) for e in (module.side.experts, untrained))
        changed = [not torch.equal(a, b) for a, b in zip(ours, before, strict=True)]
        assert changed == meant[layer].tolist()


def test_the_norm_of_an_update_is_that_of_the_experts_matrices(tiny):
    module, reports = edited(tiny("gpt2"), REQUESTS[:2])
    first = edited(tiny("gpt2"), REQUESTS[:1])[0].side.experts

    def matrices(experts):
        pairs = zip(experts.up, experts.down, strict=True)
        split = [zip(up.split(RANK, 1), down.split(RANK), strict=True) for up, down in pairs]
        return torch.stack([ALPHA / RANK * up @ down for of_layer in split for up, down in of_layer])

    expected = float((matrices(module.side.experts) - matrices(first)).norm())
    assert reports[1].update_norm == pytest.approx(expected, rel=1e-9)


def test_facts_of_a_step_are_trained_together(tiny):
    """The mean over all rows: the first loss of each is that of the untrained experts, and the experts serve both."""
    model = tiny("gpt2")
    module = build(model)
    report = module.edit(REQUESTS[:2])
    alone = [edited(tiny("gpt2"), [request])[1][0].details[0]["losses"][0] for request in REQUESTS[:1]]
    assert report.details[0]["losses"][0] == pytest.approx(alone[0], rel=1e-9)
    assert len(module.side) == 2
    one_by_one = edited(tiny("gpt2"), REQUESTS[:2])[0]
    assert not torch.allclose(one_by_one.side.experts.up, module.side.experts.up)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": [0, 1]}, "below the first"),
        ({"experts": 1}, "active=2"),
        ({"route": "firm"}, "route"),
        ({"allocation": "subject"}, "allocation"),
        ({"module": "c_fcc"}, "c_fc"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_wrong_option_is_named(wrong, said, tiny):
    with pytest.raises(UserError, match=said):
        build(tiny("gpt2"), **wrong)
