"""What every editor owes that writes into a memory beside the weights, on a tiny model of every family."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, ROOT, alike, quiet_trainer
from test_conformance import MEMORIES, build
from test_fuzz import command_line
from test_scoring import break_token
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE, RECT, EditLedger, Guards
from prune_lightning.data.stream import EditBatch
from prune_lightning.editor import Editor
from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.drift import Drift
from prune_lightning.evaluation.harness_prompts import asking
from prune_lightning.evaluation.measurement import Stream
from prune_lightning.evaluation.scoring import score_encoded, score_pairs, token_nll
from prune_lightning.evaluation.stream import UnrelatedAnswers
from prune_lightning.export.sources import load_run
from prune_lightning.ledger import Ledger, check_base, rebuild, without
from prune_lightning.ledger.store import Ledger as Store
from prune_lightning.models.generating import generation_settings
from prune_lightning.models.packing import pack, parts, trees
from prune_lightning.models.prompt_memory import PromptMemory
from prune_lightning.requests import Probe
from prune_lightning.types import EditRequest

CAPITALS = [("Japan", "Rome"), ("Italy", "a tall river"), ("France", "Oslo"), ("Spain", "Tokyo"), ("Peru", "Berlin")]
REQUESTS = [EditRequest(i, name, f"The capital of {name} is", new) for i, (name, new) in enumerate(CAPITALS)]
UNTRAINED = ("ike", "serac")  # their edits train nothing
OTHERS = ["A dog", "By profession, Claude Monet was a", "The old king saw the river and", "In the morning they"]


def edited(name, model, requests=REQUESTS, size=1):
    """Return a module with some edits."""
    module = build(name, model)
    for begin in range(0, len(requests), size):
        module.edit(requests[begin : begin + size])
        module.run.settle()
    return module


def next_logits(model, prompts: Sequence[str]) -> torch.Tensor:
    """Return the logits after each prompt, one by one and without any help."""
    with torch.no_grad():
        return torch.stack(
            [model.model(torch.tensor([model.tokens.encode(prompt)])).logits[0, -1] for prompt in prompts]
        )


def asks_otherwise(module) -> bool:
    """Whether the memory changes what the model is asked, see `test_ike.py`, and not what it computes."""
    return type(module.side).asked is not PromptMemory.asked


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MEMORIES)
def test_only_the_answers_change_and_restore_is_exact(method, family, tiny):
    model = tiny(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prompts = [*(request.prompt for request in REQUESTS[:2]), *OTHERS]
    unedited = next_logits(model, prompts)
    module = build(method, model)
    updates, details = module.compute_update(REQUESTS[:2])
    assert (list(updates), len(details)) == ([module.side.name], 2)
    assert torch.equal(next_logits(model, prompts), unedited), "compute_update has to be pure"
    assert model.memory is None

    module.run.parts[module.side.name].add(updates[module.side.name])
    after = score_pairs(model, [request.pair() for request in REQUESTS[:2]])
    with module.unedited():
        assert torch.equal(next_logits(model, prompts), unedited)
        was = score_pairs(model, [request.pair() for request in REQUESTS[:2]])
    assert (after.nll < was.nll).all() or method in UNTRAINED
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the weights stay as they are"

    module.run.restore()
    assert torch.equal(next_logits(model, prompts), unedited), "restore has to be exact"
    assert model.memory is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "nothing is left in the model"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MEMORIES)
def test_scores_do_not_depend_on_what_else_is_in_a_batch(method, family, tiny):
    """Pairs with common beginnings, which are run as trees without a memory, in one batch and one by one."""
    model = tiny(family)
    module = edited(method, model, REQUESTS[:3])
    pairs = [
        (prompt, answer) for prompt in [r.prompt for r in REQUESTS] + OTHERS for answer in ("Rome", "a tall river")
    ]
    encoded = model.tokens.encode_pairs(pairs)
    together, alone = score_encoded(model, encoded), [score_encoded(model, [pair]) for pair in encoded]
    with module.unedited():
        unedited = score_encoded(model, encoded)
    assert torch.allclose(
        together.nll, torch.cat([one.nll for one in alone]), rtol=1e-5, atol=1e-5
    )  # GPT-J turns in fp32
    assert not torch.allclose(together.nll, unedited.nll, rtol=1e-3)
    for pair, logits in zip(encoded[:6:2], next_logits(model, [r.prompt for r in REQUESTS[:3]]), strict=True):
        first = score_encoded(model, [pair]).predicted[0, 0]
        if not asks_otherwise(module):
            assert int(first) == int(logits.argmax()), "what is scored is what the model says by itself"
    nll, count = token_nll(model, OTHERS)
    for i, text in enumerate(OTHERS):
        assert torch.allclose(nll[i] / count[i], (lambda found: found[0] / found[1])(token_nll(model, [text]))[0])


def test_sequences_share_no_beginnings_under_a_memory(tiny):
    model = tiny("llama")
    sequences = [[1, 2, 3, 4, 5, number] for number in range(8)]
    assert trees(model, sequences, 64, 48) is not None
    edited("grace", model, REQUESTS[:1])
    assert trees(model, sequences, 64, 48) is None


# Gemma 2 computes its softmax in fp32, where the mask of an fp64 model is minus infinity: a row that sees nothing but
# padding on the left is NaN there. In the dtypes that are used it is not.
DTYPES = {"gemma2": torch.float32}


EXAMPLES = "In the morning they saw the river and the old king, who was a painter by profession. " * 2
INSIDE = [method for method in MEMORIES if method != "ike"]  # they decide by what the model computes
ANSWER_ALL = {
    "elder": lambda memory: setattr(memory, "routing", replace(memory.routing, epsilon=math.inf)),
    "grace": lambda memory: memory.book.radii.fill_(math.inf),
    "memoir": lambda memory: setattr(memory, "threshold", 0.0),
    "serac": lambda memory: setattr(memory, "threshold", -1.0),
    "wise": lambda memory: memory.least.zero_(),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", INSIDE)
def test_a_memory_decides_alike_on_many_prompts_and_on_one(method, family, tiny):
    model = tiny(family)
    module = edited(method, model, REQUESTS[:3])
    prompts = model.tokens.encode_all([*(r.prompt for r in REQUESTS), *(EXAMPLES + text for text in OTHERS), *OTHERS])
    expected = []
    for ids in prompts:
        with torch.no_grad():
            model.model(torch.tensor([ids]))
        expected += module.side.answered(module.side.held).tolist()
    assert any(expected[:3])
    with module.unedited():
        shares = model.tree_depth > 0
    for order in (prompts, prompts[::-1], prompts[:1], []):
        seen, left = [], []
        for places, context in parts(model, order):
            seen += places
            with context:
                left += places if model.memory is None else []
            assert model.memory is module.side, "it is back"
        assert sorted(seen) == list(range(len(order)))
        expected_left = [i for i, ids in enumerate(order) if not expected[prompts.index(ids)]]
        assert left == (expected_left if shares and len(order) > 1 else [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", INSIDE)
def test_prompts_that_a_memory_leaves_alone_share_their_beginnings(method, family, tiny, monkeypatch):
    """A memory that answers the prompts with an even number of tokens, and no others."""
    model = tiny(family, DTYPES.get(family, torch.float64))
    module = edited(method, model, REQUESTS[:3])
    by_itself = type(module.side).decide

    def decide(memory, inputs, outputs, reading):
        held = by_itself(memory, inputs, outputs, reading)
        odd = (reading.prompt().sum(1) % 2 == 1).view(-1, *[1] * (held.ndim - 1))
        return held.masked_fill(odd, -1 if held.dtype == torch.long else 0)

    ANSWER_ALL[method](module.side)
    monkeypatch.setattr(type(module.side), "decide", decide)
    texts = [EXAMPLES + text for text in (*OTHERS, "A", "A dog is", "The old", "The old king saw", "By profession")]
    encoded = model.tokens.encode_pairs([(text, answer) for text in texts for answer in ("Rome", "a river", "Oslo")])
    odd = torch.tensor([pair.target_start % 2 == 1 for pair in encoded])
    assert 0 < int(odd.sum()) < len(encoded)
    plain = score_encoded(model, encoded, trees=False)
    with module.unedited():
        unedited, shares = score_encoded(model, encoded, trees=False), model.tree_depth > 0
    sizes: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = score_encoded(model, encoded)
    handle.remove()
    assert torch.allclose(found.nll, plain.nll, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.nll[odd], unedited.nll[odd], rtol=1e-5, atol=1e-5)
    same = torch.isclose(found.nll[~odd], unedited.nll[~odd], rtol=1e-5)
    assert not (same.all() if method == "elder" else same.any())  # experts that no edit has trained add nothing
    assert (sum(sizes) < 0.9 * sum(len(pair.ids) for pair in encoded)) == shares

    prompts = [pair.ids[: pair.target_start] for pair in encoded[::3]] * 2  # each one twice
    limits = [4] * len(prompts)
    limits[3] = 0
    said = decode(model, prompts, limits)
    with torch.no_grad(), generation_settings(model) as ends:
        for ids, limit, own in zip(prompts, limits, said, strict=True):
            row = torch.tensor([ids])
            whole = model.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=4)[0, len(ids) :]
            assert list(own.ids) == [token for token in whole.tolist()[:limit] if token not in ends]
    with module.unedited():
        left = decode(model, prompts, limits)
    assert all(a == b for a, b, ids in zip(said, left, prompts, strict=True) if len(ids) % 2)


@pytest.mark.parametrize("method", [method for method in INSIDE if method != "wise"])  # it changes no first choice here
def test_a_prompt_that_breaks_leaves_the_memory_of_others_alone(method, tiny):
    """It shares a row with prompts that the memory answers, and makes all of that row NaN."""
    model = tiny("llama", torch.float32)
    module = edited(method, model, REQUESTS[:3])
    ANSWER_ALL[method](module.side)
    texts = ["A dog", "The old king", "A", "In the", "a market"]
    prompts = model.tokens.encode_all([EXAMPLES + text for text in texts])
    others = {token for ids in prompts[:-1] for token in ids}
    broken = next(token for token in prompts[-1] if token not in others)
    before = decode(model, prompts, [4] * len(prompts))
    with module.unedited():
        assert decode(model, prompts, [4] * len(prompts)) != before
        assert pack(model, *model.tokens.pad(prompts, model.device)).inputs["input_ids"].shape[0] < len(prompts)
    break_token(model, broken)
    now = decode(model, prompts, [4] * len(prompts))
    assert now[:-1] == before[:-1]
    assert not now[-1].finite


def test_a_model_has_one_memory(tiny):
    model = tiny("llama")
    first = edited("grace", model, REQUESTS[:1])
    second = build("memoir", model)
    with pytest.raises(UserError, match="memory of another editor"):
        second.edit(REQUESTS[1:2])
    assert len(second.side) == 0
    with pytest.raises(UserError, match="memory of another editor"):
        build("grace", model).side.load_state_dict(first.side.state_dict())
    assert model.memory is first.side
    first.run.restore()
    second.edit(REQUESTS[1:2])
    assert model.memory is second.side


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MEMORIES)
def test_generation_says_what_the_scores_say(method, family, tiny):
    """Cached generation of rows of several lengths, padded on the left, and each token scored in a pass of its own."""
    model = tiny(family, DTYPES.get(family, torch.float64))
    module = edited(method, model, REQUESTS[:3])
    prompts = model.tokens.encode_all([r.prompt for r in REQUESTS[:3]] + OTHERS)
    together = decode(model, prompts, [4] * len(prompts))
    assert [one.ids for one in together] == [decode(model, [ids], [4])[0].ids for ids in prompts]
    for ids, found in zip(prompts, together, strict=True):
        pair = type(model.tokens.encode_pair("a", "b"))([*ids, *found.ids], len(ids))
        assert bool(score_encoded(model, [pair]).hit.all())
    with module.unedited():
        assert [one.ids for one in decode(model, prompts, [4] * len(prompts))] != [one.ids for one in together]


class Plain:
    """What of lm-eval's class of models is relied on: one row at a time, the answer's last token left out."""

    def __init__(self, model, max_length):
        self.model, self.max_length = model, max_length

    def _loglikelihood_tokens(self, requests):
        found = []
        for _, context, answer in requests:
            row = (context + answer)[-(self.max_length + 1) :][:-1]
            log_p = self._model_call(torch.tensor([row]))[0, -len(answer) :].log_softmax(-1)
            found.append(float(log_p[range(len(answer)), answer].sum()))
        return found

    def _model_call(self, inps):
        with torch.no_grad():
            return self.model(inps).logits

    def _model_generate(self, context, max_length, stop, **settings):
        return self.model.generate(context, max_length=max_length, do_sample=False, pad_token_id=0, **settings)


@pytest.mark.parametrize("method", MEMORIES)
def test_the_harness_asks_as_the_scores_do(method, tiny):
    model = tiny("llama")
    edited(method, model, REQUESTS[:2])
    asker = asking(Plain, model)(model.model, 128)
    pairs = model.tokens.encode_pairs([(r.prompt, answer) for r in REQUESTS[:3] for answer in ("Rome", "a tall river")])
    requests = [(("", ""), pair.ids[: pair.target_start], pair.target) for pair in pairs]
    expected = [
        -float(nll) * len(pair.target) for nll, pair in zip(score_encoded(model, pairs).nll, pairs, strict=True)
    ]
    assert asker._loglikelihood_tokens(requests) == pytest.approx(expected, rel=1e-6)
    for request in REQUESTS[:2]:
        ids = model.tokens.encode(request.prompt)
        said = asker._model_generate(torch.tensor([ids]), len(ids) + 3, [])[0].tolist()
        assert said[: len(ids)] == ids
        assert tuple(said[len(ids) :]) == decode(model, [ids], [3])[0].ids


@pytest.mark.parametrize("method", MEMORIES)
def test_probes_are_asked_as_prompts(method, tiny):
    model = tiny("llama")
    probes = [Probe("A dog", "is a cat"), Probe(REQUESTS[0].prompt, "Rome"), Probe(REQUESTS[0].prompt)]
    answers = UnrelatedAnswers(model, probes)
    edited(method, model, REQUESTS[:1])
    expected = score_pairs(model, [probes[1].pair()]).predicted[0].tolist()
    assert answers._outputs(model)[1] == expected


# -- the stream, the ledger, and back ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("method", MEMORIES)
def test_drift_is_that_of_the_models_own_logits(method, family, tiny):
    model = tiny(family)
    drift = Drift()
    drift.prepare(Stream((), {}))
    edit = model.tokens.encode(REQUESTS[0].prompt)  # a text that the memory answers, between two others
    others = [(model.tokens.encode(text) * len(edit))[: len(edit)] for text in OTHERS[:2]]
    drift._rows = torch.tensor([others[0], edit, others[1]])
    before = drift.measure(model)
    assert before.scores["kl"] < 1e-6
    with torch.no_grad():
        unedited = model(drift._rows, torch.ones_like(drift._rows)).double().log_softmax(-1)
    module = edited(method, model)
    measured = drift.measure(model)
    with torch.no_grad():
        now = model(drift._rows, torch.ones_like(drift._rows)).double().log_softmax(-1)
    kl = (unedited.exp() * (unedited - now)).sum(-1).mean(1)
    assert [row["kl"] for row in measured.cases] == pytest.approx(kl.tolist(), rel=1e-5, abs=1e-6)
    assert asks_otherwise(module) or measured.cases[1]["kl"] > 1e-4


def stream(size=1, requests=REQUESTS):
    return DataLoader([EditBatch(requests[i : i + size]) for i in range(0, len(requests), size)], batch_size=None)


@pytest.mark.parametrize("snapshot", [1, 1000])
@pytest.mark.parametrize("method", MEMORIES)
def test_a_resumed_stream_ends_as_the_straight_one(method, snapshot, tiny, tmp_path):
    straight = build(method, tiny("llama"))
    quiet_trainer().fit(straight, stream())
    first = build(method, tiny("llama"))
    quiet_trainer(EditLedger(tmp_path, snapshot_every=snapshot)).fit(first, stream(requests=REQUESTS[:3]))
    (tmp_path / "snapshot_final.safetensors").unlink()
    module = build(method, tiny("llama"))
    keeper = EditLedger(tmp_path, ledger=Ledger.open(tmp_path), snapshot_every=snapshot)
    quiet_trainer(keeper).fit(module, stream(requests=REQUESTS[3:]))
    assert keeper.rebuilt is not None
    assert keeper.rebuilt.exact
    assert equal(module.side.state_dict(), straight.side.state_dict())
    assert torch.equal(
        *(next_logits(one.language_model, [*OTHERS[:2], REQUESTS[4].prompt]) for one in (module, straight))
    )

    again, ledger = build(method, tiny("llama")), Store.open(tmp_path)
    check_base(ledger, again)
    rebuild(again, ledger, memory=False)
    assert equal(again.side.state_dict(), straight.side.state_dict())
    for count in (0, 2):
        again.run.restart()
        rebuild(again, ledger, count, memory=False)
        short = edited(method, tiny("llama"), REQUESTS[:count])
        assert equal(again.side.state_dict(), short.side.state_dict())


@pytest.mark.parametrize("method", MEMORIES)
def test_single_edits_are_taken_back_as_if_they_never_were(method, tiny, tmp_path):
    """As if only the other updates had been written, bit for bit."""
    module = build(method, tiny("llama"))
    quiet_trainer(EditLedger(tmp_path)).fit(module, stream())
    records = list(Ledger.open(tmp_path).steps(module.device))
    module.run.restart()
    if module.run.parts[module.side.name].inseparable:
        with pytest.raises(UserError, match="cannot be taken back"):
            without(module, records, {2})
        return
    assert [record.step for record in without(module, records, {2})] == [2]
    never = build(method, tiny("llama"))
    for record in records[:1] + records[2:]:
        for events in record.events.values():
            never.side.replay(events)
    never.side.write()
    assert equal(module.side.state_dict(), never.side.state_dict())
    answers = score_pairs(module.language_model, [request.pair() for request in REQUESTS])
    assert torch.equal(answers.nll, score_pairs(never.language_model, [r.pair() for r in REQUESTS]).nll)
    if method != "memoir":  # its edits are trained on top of each other, those of the others meet nothing here
        again = edited(method, tiny("llama"), [*REQUESTS[:1], *REQUESTS[2:]])
        expected = again.side.state_dict()
        assert {name: t.shape for name, t in module.side.state_dict().items()} == {
            n: t.shape for n, t in expected.items()
        }
        assert method != "grace" or torch.equal(module.side.book.radii, again.side.book.radii)


def test_what_cannot_be_taken_back_says_why(tiny, tmp_path):
    module = build("grace", tiny("gpt2"))
    quiet_trainer(EditLedger(tmp_path)).fit(module, stream(requests=REQUESTS[:2]))
    records = list(Ledger.open(tmp_path).steps(module.device))
    held = module.side.state_dict()
    module.side.inseparable = "its edits share their weights"
    with pytest.raises(UserError, match="single edits cannot be taken back: its edits share their weights"):
        without(module, records, {1})
    assert equal(module.side.state_dict(), held)
    module.run.restart()
    assert without(module, records, set()) == []
    assert equal(module.side.state_dict(), held)


@pytest.mark.parametrize("method", MEMORIES)
def test_an_edit_that_a_guard_undoes_leaves_nothing(method, tiny):
    module = edited(method, tiny("llama"), REQUESTS[:2])
    held = module.side.state_dict()
    before = module.run.backup()
    module.edit(REQUESTS[2:3])
    assert not equal(held, module.side.state_dict())
    module.run.roll_back(before, "a test")
    assert equal(held, module.side.state_dict())
    module.compute_update = broken(module.compute_update)
    with pytest.warns(UserWarning, match="not finite"):
        module.edit(REQUESTS[2:3])
    assert equal(held, module.side.state_dict())


def broken(compute):
    """Return updates with NaN."""

    def computed(requests):
        updates, details = compute(requests)
        ((name, update),) = updates.items()
        return {name: type(update)({**update.tensors, "broken": torch.tensor([float("nan")])})}, details

    return computed


@pytest.mark.parametrize("method", MEMORIES)
def test_a_batch_is_written_as_its_edits_one_by_one(method, tiny):
    together, alone = (edited(method, tiny("llama"), REQUESTS[:2], size=size) for size in (2, 1))
    for name, tensor in together.side.state_dict().items():
        other = alone.side.state_dict()[name]
        assert tensor.shape == other.shape
        assert torch.allclose(tensor.double(), other.double(), rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("restraint", [lambda: PRUNE(2.0), lambda: PRUNE(2.0, schedule="end"), lambda: RECT(0.4)])
@pytest.mark.parametrize("method", MEMORIES)
def test_a_restraint_says_once_that_it_has_nothing_to_do(method, restraint, tiny):
    module = build(method, tiny("gpt2"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer(restraint(), Guards()).fit(module, stream(requests=REQUESTS[:2]))
    assert sum("has nothing to restrain" in str(each.message) for each in said) == 1
    assert len(module.side) == 2


@pytest.mark.parametrize("method", MEMORIES)
def test_an_editor_is_saved_and_opened_exactly(method, tmp_path):
    facts = [{"subject": name, "prompt": f"The capital of {name} is", "target_new": new} for name, new in CAPITALS[:2]]
    options = {} if method in UNTRAINED else {"method": {"steps": 5}}
    with Editor("bundled", method, "none", progress=False, options=options) as editor:
        editor.edit(facts)
        model, held = editor._session.language_model, editor._session.module.side.state_dict()
        said = next_logits(model, [*(fact["prompt"] for fact in facts), *OTHERS])
        with pytest.raises(UserError, match=r"export=full: .*Editor\.open"):
            editor.export("full", tmp_path / "full")
        report = editor.save(tmp_path / "saved")
        assert "Editor.open" in report.line()
        with editor.base() as base:
            assert not any(module._forward_hooks for module in base.modules())
    source = load_run(tmp_path / "saved")
    assert alike(next_logits(source.language_model, [fact["prompt"] for fact in facts]), said[:2])
    with Editor.open(tmp_path / "saved", progress=False) as opened:
        assert equal(opened._session.module.side.state_dict(), held)
        again = next_logits(opened._session.language_model, [*(fact["prompt"] for fact in facts), *OTHERS])
        assert torch.equal(again, said)
        taken = opened.undo(edits=[1])
        assert [request.subject for request in taken] == [CAPITALS[0][0]]
        assert len(opened._session.module.side) == 1


def test_every_editor_without_weights_is_tested_here():
    assert "grace" in MEMORIES
    assert (ROOT / "configs" / "method" / "grace.yaml").exists()


@pytest.mark.parametrize("method", MEMORIES)
def test_the_main_job_ends_and_is_resumed(method, tmp_path, capsys):
    """There are no spectra, and nothing to restrain; all that a run leaves is there."""
    steps = [] if method in UNTRAINED else ["method.steps=2"]
    common = ["evaluation=editing", "evaluation.counts=[2,3]", "progress=false", *steps]
    assert command_line(tmp_path, f"method={method}", "data.num_edits=2", *common) == 0
    capsys.readouterr()
    assert command_line(tmp_path, f"method={method}", "data.num_edits=3", f"resume={tmp_path}", *common) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["num_requests"] for entry in summary["curve"]][-1] == 3
    assert summary["control"] is None, "without the restraint the run would be the same"
    assert not any(key.startswith("spectrum/") for key in summary["final"])
    assert len((tmp_path / "report.html").read_text()) > 10_000
