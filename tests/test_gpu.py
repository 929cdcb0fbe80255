"""On a GPU, in every precision, against fp64 on the CPU; on a pretended device wherever the tests run.

A model in 16 bits computes its activations in 16 bits. What is written into its weights is computed from them in fp64
or fp32 and rounded once. So the whole of a method is compared within what 16 bits leave of the activations, and what
it makes of them within the rounding of fp64.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import distributed_metrics
import pytest
import stream_entries
import test_export
import test_guards
import test_ledger
import test_memory_editors as memories
import test_restraint_conformance as rules
import torch
from conftest import ROOT, build_tiny, write
from hydra.utils import instantiate
from omegaconf import DictConfig
from places import APART, GPU, Place
from safetensors.torch import load_file
from test_configs import compose
from test_conformance import MEMORIES, METHODS, REQUESTS, build
from test_devices import reachable
from test_restraint import edits
from test_train import train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from prune_lightning import Editor, metrics
from prune_lightning.bundled.corpus import BundledCorpus
from prune_lightning.callbacks import PRUNE, RECT, EditLedger
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.measurement import Stream
from prune_lightning.evaluation.scoring import score_pairs, token_nll
from prune_lightning.export.delta import apply_delta
from prune_lightning.export.exporting import export
from prune_lightning.ledger import Ledger, rebuild, without
from prune_lightning.methods.knowledge_neurons import KnowledgeNeurons
from prune_lightning.methods.layerwise_keys import LayerwiseKeyReader
from prune_lightning.methods.locate_then_edit import LocateThenEdit
from prune_lightning.methods.neuron_attribution import answer_tokens, integrated_gradients
from prune_lightning.methods.value import Values, optimise_values
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoment, SecondMoments
from prune_lightning.spectral.diagnostics import singular_values
from prune_lightning.tasks.collapse import bisect_collapses
from prune_lightning.tasks.setup import fit
from prune_lightning.types import LowRankUpdate

# A fast path that does not fit the device would hide behind its warning.
pytestmark = pytest.mark.filterwarnings("error:the fast path")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOCATING = ("alphaedit", "emmet", "memit", "p_rome", "r_rome", "rome")


def cases(*names: str, apart: str = "fp32") -> list:
    """Return the precisions on the GPU, and one on the pretended device."""
    on_gpu = [pytest.param(*GPU.values, DTYPES[name], id=f"cuda-{name}", marks=GPU.marks) for name in names or DTYPES]
    return [pytest.param(*APART.values, DTYPES[apart], id=f"apart-{apart}"), *on_gpu]


@pytest.fixture
def here(place: Place) -> Iterator[Place]:
    """The place, active."""
    with place.active():
        yield place


def rounded(family: str, dtype: torch.dtype, to: torch.dtype, device: torch.device) -> LanguageModel:
    """Return a tiny model whose weights are numbers of one dtype, in another."""
    return build_tiny(family, torch.float64).to(dtype).to(to).to(device)


def test_the_pretended_device_refuses_to_draw():
    with Place("apart").active():
        x = torch.ones(4).to(APART.values[0].device)
        for draw in (lambda: torch.rand_like(x), lambda: torch.nn.functional.dropout(x, 0.5), lambda: x.normal_()):
            with pytest.raises(RuntimeError, match="random numbers are drawn on the device"):
                draw()


# -- methods ----------------------------------------------------------------------------------------------------------
@cache
def in_fp64(method: str, family: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict]]:
    """Return a method's update and its details, computed on the CPU in fp64, of a model with weights of ``dtype``."""
    module = build(method, rounded(family, dtype, torch.float64, torch.device("cpu")))
    updates, details = module.compute_update(REQUESTS)
    return {name: update.dense() for name, update in updates.items()}, details


def tolerance(dtype: torch.dtype) -> float:
    """Return how far an update may be off, relative to its norm.

    Adam's first step is the sign of the gradient. Of its components a share of some eps are so small that rounding
    turns their sign, which moves the value by the root of that share.
    """
    return 4 * torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize(("place", "dtype"), cases())
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_computes_what_it_does_in_fp64_on_the_cpu(method, family, place, dtype, monkeypatch):
    if place.name == "apart" and family == "gpt2":
        pytest.skip("one family is enough to show mistakes of devices")
    expected, known = in_fp64(method, family, dtype)
    if method == "kn":  # a neuron at the threshold is in or out: the same ones here, their attributions below
        given = {request.case_id: detail for request, detail in zip(REQUESTS, known, strict=True)}
        monkeypatch.setattr(KnowledgeNeurons, "_locate", lambda self, request: given[request.case_id])
    with place.active():
        module = build(method, rounded(family, dtype, dtype, place.device))
        updates, details = module.compute_update(REQUESTS)
        found = {name: update.dense().double().cpu() for name, update in updates.items()}
        devices = {update.dense().device.type for update in updates.values()}
    assert devices == {place.device.type}
    assert len(details) == len(REQUESTS)
    json.dumps(details)  # numbers, not tensors on a device
    assert found.keys() == expected.keys()
    total = sum(float((found[name] - expected[name]).square().sum()) for name in expected) ** 0.5
    norm = sum(float(update.square().sum()) for update in expected.values()) ** 0.5
    assert total <= tolerance(dtype) * norm


@pytest.mark.parametrize(("place", "dtype"), cases())
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neurons_are_attributed_what_they_are_in_fp64_on_the_cpu(family, place, dtype):
    def attributions(to, device):
        module = build("kn", rounded(family, dtype, to, device))
        model, pairs = module.language_model, [request.pair(request.target_old) for request in REQUESTS]
        questions = [question for answer in answer_tokens(model, pairs) for question in answer]
        found = integrated_gradients(model, module.layers, questions, module.attribution)
        return torch.cat([found[layer].cpu() for layer in module.layers]).double()

    expected = attributions(torch.float64, torch.device("cpu"))
    with place.active():
        found = attributions(dtype, place.device)
    assert float((found - expected).norm()) <= 32 * torch.finfo(dtype).eps * float(expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_captured_step_gives_the_values_of_an_ordinary_one(method, dtype):
    """Also where a request ends early, and the rest is recorded anew."""
    module = build(method, rounded("llama", dtype, dtype, torch.device("cuda")))
    rows, site = module.rows(REQUESTS), ShiftSite(1, "mlp" if method == "rome" else "block")

    def values(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return optimise_values(module.language_model, rows, site, replace(module.value, steps=12, **options))

    losses = [detail["losses"] for detail in values(stop_loss=0.0).details]
    between = sum(sorted(losses[i][4] for i in range(2))) / 2  # one request is done by then
    for stop in (0.0, between):
        ordinary, captured = values(stop_loss=stop), values(stop_loss=stop, graph=True)
        assert [d["steps"] for d in captured.details] == [d["steps"] for d in ordinary.details]
        error = float((captured.target - ordinary.target).norm() / (ordinary.target - ordinary.reference).norm())
        assert error <= tolerance(dtype)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_value_step_waits_for_the_device_once(method):
    """Beside it, `transformers` looks up to twice whether any token is padding, outside a captured graph."""

    def waits(steps):
        with Place("apart").active() as device:
            module = build(method, rounded("llama", torch.float32, torch.float32, APART.values[0].device))
            module.value = replace(module.value, steps=steps, stop_loss=0.0)
            before = len(device.waits)
            rows, site = module.rows(REQUESTS), ShiftSite(1, "mlp" if method == "rome" else "block")
            optimise_values(module.language_model, rows, site, module.value)
            return Counter(line for _, line in device.waits[before:])

    more = waits(9) - waits(4)
    ours = {line: count for line, count in more.items() if line.startswith("value")}
    assert sum(ours.values()) == 5
    assert sum(more.values()) <= 15, more


# Per step and matrix: the norm of the update, then what the restraint asks for. PRUNE needs one number where nothing
# exceeds the reference, and elsewhere as many as its decomposition and its law return.
WAITS = {
    "prune below": (lambda: PRUNE(1.2), 1e-3, 2),
    "prune above": (lambda: PRUNE(1.2), 1.0, 6),
    "rect": (lambda: RECT(0.4), 1.0, 2),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_restrained_step_waits_for_the_device_as_often_as_documented(name):
    make, scale, expected = WAITS[name]

    def waits(steps):
        with Place("apart").active() as device:
            model = rounded("llama", torch.float32, torch.float32, APART.values[0].device)
            module, restraint = test_ledger.CaseEdits(model, [1]), make()
            compute = module.compute_update

            def scaled(requests):
                ((name, update),), details = compute(requests)[0].items(), [{} for _ in requests]
                return {name: LowRankUpdate(scale * update.left, update.right)}, details

            module.compute_update = scaled
            restraint.attach(module)
            before = len(device.waits)
            for step, batch in enumerate(edits(steps), start=1):
                module.edit(batch.requests)
                restraint.after_step(step)
                assert restraint.metrics
                module.run.settle()
            return Counter(device.waits[before:])

    assert (waits(9) - waits(4)).total() == 5 * expected


class Launches(TorchDispatchMode):
    """Counts the operations inside the block."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_an_update_is_added_in_few_launches_and_with_the_bits_of_the_cpu():
    """A matrix of Llama-3-8B takes two operations for each pair of columns, and not for each block of rows."""
    left, right, matrix = (torch.empty(*size, device="meta") for size in ((4096, 32), (14336, 32), (4096, 14336)))
    with Launches() as launches:
        LowRankUpdate(left, right).add_to(matrix)
    views = 3 * 32  # of a column of each factor, and its broadcast
    assert launches.count <= 2 * 32 + views + 16
    generator = torch.Generator().manual_seed(0)
    left, right, matrix = (torch.randn(*size, generator=generator) for size in ((700, 5), (900, 5), (700, 900)))
    with Place("apart").active():
        there = matrix.to(APART.values[0].device)
        LowRankUpdate(left, right).to(there.device).add_to(there)
        found = there.cpu()
    LowRankUpdate(left, right).add_to(matrix)  # in three blocks, 2^18 entries each
    assert torch.equal(found, matrix)


@pytest.mark.parametrize(("place", "dtype"), cases(apart="bf16"))
@pytest.mark.parametrize("method", LOCATING)
def test_what_is_made_of_keys_and_values_is_exact_and_rounded_once(method, place, dtype, monkeypatch):
    """What the method read on the device is handed to the same method in fp64 on the CPU."""
    read: list = []
    optimise, keys = LocateThenEdit.optimise, LayerwiseKeyReader.keys

    def recorded_values(self, *arguments):
        read.append(optimise(self, *arguments))
        return read[-1]

    def recorded_keys(self, layer, until=None):
        found = keys(self, layer, until)
        read.append((found, self.hidden))
        return found

    requests = REQUESTS[1:]  # of several, the later ones read a weight that was rounded in between
    with place.active(), monkeypatch.context() as patch:
        patch.setattr(LocateThenEdit, "optimise", recorded_values)
        patch.setattr(LayerwiseKeyReader, "keys", recorded_keys)
        module = build(method, rounded("llama", dtype, dtype, place.device))
        module.value = replace(module.value, clamp=50.0)  # far moves, so that rounding them shows
        ((name, update),) = module.compute_update(requests)[0].items()
    with place.active():
        replayed = [
            Values(entry.target.cpu(), entry.reference.cpu(), entry.details)
            if isinstance(entry, Values)
            else tuple(None if tensor is None else tensor.cpu() for tensor in entry)
            for entry in read
        ]
        before = module.language_model.rewrite_module(1).weight.detach().double().cpu()
        write(module, requests, {name: update})
        weight = module.language_model.rewrite_module(1).weight.detach().double().cpu()
        ours, moments = update.dense().cpu(), module.moments[1].matrix.cpu()
    assert ours.dtype == torch.float64
    assert moments.dtype == torch.float64

    def replayed_keys(self, layer, until=None):
        found, self.hidden = replayed.pop(0)
        return found

    replay = build(method, rounded("llama", dtype, torch.float64, torch.device("cpu")))
    replay.moments = {1: SecondMoment(moments)}
    replay.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(LocateThenEdit, "optimise", lambda *_: replayed.pop(0))
        patch.setattr(LayerwiseKeyReader, "keys", replayed_keys)
        expected = replay.compute_update(requests)[0][name].dense()
    assert not replayed
    condition = float(torch.linalg.cond(moments))
    assert float((ours - expected).norm() / expected.norm()) <= 100 * torch.finfo(torch.float64).eps * condition
    assert within_rounding(weight, before + expected, expected.norm(), dtype)


def within_rounding(weight: Tensor, expected: Tensor, moved: float, dtype: torch.dtype) -> bool:
    """Whether a weight is the expected one, rounded once; changes of norm ``moved`` are summed in fp32."""
    info, single = torch.finfo(dtype), torch.finfo(torch.float32).eps
    once = expected.abs() * info.eps / 2 * (1 + 1e-6) + info.smallest_normal * info.eps
    return bool(((weight - expected).abs() <= once + 16 * single * (expected.abs() + moved / len(weight))).all())


# -- memories beside the weights, and scores ---------------------------------------------------------------------------
def asked(method: str, model: LanguageModel) -> tuple[Tensor, Tensor, list]:
    """Edit, and return the target's likelihoods after the prompts, those of other texts, and free answers."""
    module = memories.edited(method, model, memories.REQUESTS[:3])
    after = score_pairs(model, [request.pair() for request in memories.REQUESTS]).nll
    aside = token_nll(model, memories.OTHERS)[0]
    prompts = model.tokens.encode_all([request.prompt for request in memories.REQUESTS[:3]])
    answers = [found.ids for found in decode(model, prompts, [4] * len(prompts))]
    module.run.take_events()  # as the ledger does, whose updates may lie anywhere
    at = {tensor.device.type for _, tensor in reachable(module.side)}
    assert at <= {model.device.type}
    return after.double().cpu(), aside.double().cpu(), answers


@pytest.mark.parametrize(("place", "dtype"), cases())
@pytest.mark.parametrize("method", MEMORIES)
def test_a_memory_answers_as_it_does_on_the_cpu(method, place, dtype):
    """In the same precision: an edit trains it, and what it answers by is chosen by distances."""
    expected, beside, said = asked(method, rounded("llama", dtype, dtype, torch.device("cpu")))
    with place.active():
        found, aside, told = asked(method, rounded("llama", dtype, dtype, place.device))
    close = {"rtol": 4 * tolerance(dtype), "atol": 4 * tolerance(dtype)}
    if place.name == "apart":  # which computes on the CPU
        close = {"rtol": 1e-5, "atol": 1e-5}
        assert told == said
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(aside, beside, **close)


SCORED = (
    "evaluation=everyday", "evaluation.everyday.max_items=1", "evaluation.miniature.max_items=2",
    "evaluation.miniature.enabled=true", "evaluation.drift.max_tokens=64", "evaluation.wild.enabled=true",
    "evaluation.wild.max_new_tokens=4", "evaluation.zsre.enabled=true", "evaluation.easyedit.enabled=true",
    "evaluation.generation.enabled=true", "evaluation.generation.max_tokens=4", "evaluation.perplexity.enabled=true",
    "evaluation.perplexity.max_items=2",
    *(f"evaluation.{name}.enabled=false" for name in ("legacy", "lm_eval", "me_ppl")),  # which need files
)  # fmt: skip


def scores_of(model: LanguageModel) -> dict[str, float]:
    """Return what all measurements say of a model after one edit."""
    stream = BundledWorld(num_edits=2)
    stream.setup()
    cases_of = dict(enumerate(stream.requests))
    config = compose(*SCORED).evaluation
    entries = [entry for entry in config.values() if isinstance(entry, DictConfig) and entry.get("enabled")]
    measured = [instantiate(entry, _convert_="all") for entry in entries]
    module = test_ledger.CaseEdits(model, [1])
    with model.frozen_mode():
        for each in measured:
            each.prepare(Stream(stream.requests, module.edited_matrices()))
            each.take_reference(model, cases_of)
        module.edit(stream.requests[:1])
        return {f"{each.name}/{n}": v for each in measured for n, v in each.measure(model, cases_of).scores.items()}


@pytest.mark.parametrize("place", [APART, GPU])
def test_every_score_on_the_device(place):
    pytest.importorskip("nltk")
    expected = scores_of(rounded("llama", torch.float32, torch.float32, torch.device("cpu")))
    with place.active():
        found = scores_of(rounded("llama", torch.float32, torch.float32, place.device))
    assert {name.rpartition("/")[0] for name in found} >= {"edit/wild", "ability/everyday", "drift"}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3, nan_ok=True)


# -- restraints -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("place", "dtype"), cases(apart="bf16"))
@pytest.mark.parametrize("name", ["none", *rules.LAWS])
def test_a_restraint_is_its_rule_in_every_precision(name, here, place, dtype):
    def model(family):
        return rounded(family, dtype, dtype, place.device)

    originals, watch = rules.run(model, rules.restraint(name), place.trainer)
    for index, layer in enumerate(rules.LAYERS):
        original = originals[index].double().cpu()
        moved = sum(float(rules.update(layer, step).norm()) for step in range(rules.STEPS))
        expected, _, final = rules.by_rule(name, original, layer)
        assert {weights[index].device.type for weights in watch.weights} == {place.device.type}
        found = [*(weights[index] for weights in watch.weights), watch.final[index]]  # the Trainer leaves it on the CPU
        for weight, value in zip(found, [*expected, final], strict=True):
            assert weight.dtype == dtype
            assert within_rounding(weight.double().cpu(), value, moved, dtype), (layer, name)


@pytest.mark.parametrize(("place", "dtype"), cases())
@pytest.mark.parametrize("name", sorted({*rules.NAMES} - {"none", *rules.LAWS}))
def test_a_restraint_without_a_law_does_what_it_does_on_the_cpu(name, here, place, dtype):
    def weights(device, trainer):
        return rules.run(lambda f: rounded(f, dtype, dtype, device), rules.restraint(name), trainer)[1].weights

    for ours, theirs in zip(weights(place.device, place.trainer), weights("cpu", rules.quiet_trainer), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            one, other = one.double().cpu(), other.double()
            # Subspaces come from activations, summed in another order there. Eigenvectors turn by that rounding over
            # the gap between eigenvalues, which is at least a tenth of them in these models.
            assert float((one - other).norm()) <= 10 * 16 * torch.finfo(dtype).eps * float(other.norm())


# -- guards, ledger, bisection ----------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:case", "ignore:the update of case")
@pytest.mark.parametrize(("place", "dtype"), cases())
@pytest.mark.parametrize("name", test_guards.PLANTED)
def test_guards_refuse_what_they_refuse_on_the_cpu(name, here, place, dtype, tmp_path):
    def model():
        return rounded("llama", dtype, dtype, place.device)

    watching = test_guards.guards(policy="skip", path=tmp_path / "quarantine.jsonl")
    planted = {5: test_guards.PLANTED[name]}
    bad = test_guards.run(
        test_guards.module_with(model(), planted), range(8), trainer=place.trainer(PRUNE(1.2), watching)
    )
    numbers = [number for number in range(8) if number != 5]
    good = test_guards.run(test_guards.module_with(model(), {}), numbers, trainer=place.trainer(PRUNE(1.2)))
    (line,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (line["guard"], line["request"]["case_id"]) == (name, 5)
    test_guards.assert_same(bad, good)


@pytest.mark.filterwarnings("ignore:case")
@pytest.mark.parametrize("place", [APART, GPU])
def test_a_ruinous_edit_is_rolled_back(here, place, tmp_path):
    watching = test_guards.rolling_back(path=tmp_path / "quarantine.jsonl")
    model = load_language_model(test_guards.BUNDLED).to(place.device)
    module = test_guards.module_with(model, test_guards.RUINOUS)
    test_guards.run(module, range(6), trainer=place.trainer(PRUNE(1.2), watching))
    assert [reading.kept for reading in watching.readings] == [number != 4 for number in range(6)]


@pytest.mark.parametrize(("place", "dtype"), cases())
@pytest.mark.parametrize("name", test_ledger.RESTRAINTS)
def test_the_ledger_resumes_rebuilds_and_takes_back(name, here, place, dtype, tmp_path):
    def fresh(restraint):
        module = test_ledger.CaseEdits(rounded("llama", dtype, dtype, place.device), [1])
        if restraint:
            restraint.attach(module)
        return module

    def edit(module, batches, keep, *callbacks):
        place.trainer(*callbacks, keep).fit(module, DataLoader(batches, batch_size=None))
        module.trainer = None
        module.to(place.device)  # the Trainer has moved it to the CPU

    def given():
        restraint = test_ledger.RESTRAINTS[name]()
        return [restraint] if restraint else []

    straight, keep = fresh(None), test_ledger.Keep()
    edit(straight, edits(12), keep, *given(), EditLedger(tmp_path / "straight", snapshot_every=5))
    first = fresh(None)
    edit(first, edits(7), test_ledger.Keep(), *given(), EditLedger(tmp_path / "parts", snapshot_every=5))
    if not any(getattr(restraint, "schedule", "each") != "each" for restraint in given()):
        ledger = Ledger.open(tmp_path / "parts").verified()
        resumed = fresh(None)
        edit(resumed, edits(12)[7:], test_ledger.Keep(), *given(), EditLedger(tmp_path / "parts", ledger=ledger))
        assert torch.equal(resumed.matrix().weight(), straight.matrix().weight())
    again = fresh(None)
    rebuild(again, Ledger.open(tmp_path / "straight"))
    assert torch.equal(again.matrix().weight(), straight.matrix().weight())
    restraints = given()
    module = fresh(restraints[0] if restraints else None)
    ledger = Ledger.open(tmp_path / "straight")
    rebuild(module, ledger, 8, restraints[0].restrain if restraints else None)
    eps = torch.finfo(dtype).eps
    assert test_ledger.relative(module, keep.weights[7]) <= 4 * eps
    restraints, taken_back = given(), {2, 9, 10}
    module = fresh(restraints[0] if restraints else None)
    without(
        module, ledger.steps(module.device), taken_back,
        lambda: [restraint.after_step(module.run.num_steps) for restraint in restraints],
    )  # fmt: skip
    module.run.finish()
    other, rest = fresh(None), [batch for number, batch in enumerate(edits(12), start=1) if number not in taken_back]
    edit(other, rest, test_ledger.Keep(), *given())
    assert test_ledger.relative(module, other.matrix().weight()) <= 4 * eps


@pytest.mark.parametrize(("place", "dtype"), cases())
def test_the_step_of_a_collapse_is_found(here, place, dtype, tmp_path):
    module, keep = test_ledger.CaseEdits(rounded("llama", dtype, dtype, place.device), [1]), test_ledger.Keep()
    base = module.language_model.rewrite_module(1).weight.detach().clone()
    place.trainer(keep, EditLedger(tmp_path)).fit(module, DataLoader(edits(20), batch_size=None))
    kept = [1.0, *(1 / (1 + float((weight - base).norm())) for weight in keep.weights)]
    at = next(step for step, value in enumerate(kept) if value <= 0.013)
    scaled = [min(1.0, 0.5 * value / kept[at]) for value in kept]
    curve = [{"num_requests": n, "ability/near/retention": scaled[n]} for n in (0, at - 2, at + 3, at + 6, 20)]
    evaluation = test_ledger.evaluated(test_ledger.Distance(base), curve, 2 * kept[at])
    fresh = test_ledger.CaseEdits(rounded("llama", dtype, dtype, place.device), [1])
    assert bisect_collapses(fresh, Ledger.open(tmp_path), evaluation, None) == {"ability/near/retention": at}
    assert torch.equal(fresh.matrix().weight(), keep.weights[-1])


# -- metrics ----------------------------------------------------------------------------------------------------------
def everything(device: torch.device | str) -> dict[str, dict[str, Tensor]]:
    """Return what every metric computes from the same numbers on a device."""
    shared = distributed_metrics.compute(list(range(7)), False, device)
    found = {name: shared for name in ("CounterFactScore", "TokenMatch", "GenerationScore", "CaseMeans")}
    found["RetentionMatrix"] = stream_entries.filled(stream_entries.ENTRIES, device).compute()
    curve = metrics.AbilityCurve().to(device)
    for count, score in ((0, 0.9), (10, 0.8), (20, 0.5), (30, 0.1)):
        curve.update(count, score)
    found["AbilityCurve"] = curve.compute()
    nll, count = torch.tensor([2.0, 9.0, float("nan"), 0.0], device=device), torch.tensor([2, 3, 4, 0], device=device)
    for name in ("CorpusPerplexity", "SentencePerplexity"):
        metric = getattr(metrics, name)().to(device)
        metric.update(nll[:2], count[:2])
        metric.update(nll, count)
        found[name] = metric.compute()
    drift = metrics.Divergence().to(device)
    drift.update(
        torch.tensor([0.5, float("inf"), 0.25], device=device), torch.tensor([True, False, True], device=device)
    )
    found["Divergence"] = drift.compute()
    exact = metrics.ExactMatch().to(device)
    exact.update(torch.tensor([True, False, True], device=device))
    found["ExactMatch"] = exact.compute()
    rouge = metrics.MeanRouge().to(device)
    rouge.update(["the old king of the north"], ["the king of the north"])
    found["MeanRouge"] = rouge.compute()
    return {name: value if isinstance(value, dict) else {name: value} for name, value in found.items()}


@pytest.mark.parametrize("place", [APART, GPU])
def test_every_metric_on_the_device(here, place):
    pytest.importorskip("nltk")
    found, expected = everything(place.device), everything("cpu")
    assert set(found) == set(metrics.__all__)
    for metric, values in expected.items():
        assert values.keys() == found[metric].keys()
        for name, value in values.items():
            ours = torch.as_tensor(found[metric][name]).double().cpu()
            torch.testing.assert_close(ours, torch.as_tensor(value).double(), rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("place", [APART, GPU])
def test_singular_values_of_a_long_matrix_are_those_of_a_square_one(here, place, monkeypatch):
    matrix = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    shapes, decompose = [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda given: shapes.append(tuple(given.shape)) or decompose(given))
    for given in (matrix, matrix.T, matrix[:30]):
        expected = decompose(given.double())
        found = singular_values(given.to(place.device)).cpu()
        assert float((found - expected).abs().max()) <= 1e-13 * float(expected[0])
    assert shapes == [(20, 20), (20, 20), (30, 20)]


# -- what stays in the CPU's memory -----------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [APART, GPU])
@pytest.mark.parametrize(
    ("method", "options"), [("memit", {"accumulate_past_keys": True}), ("alphaedit", {"null_threshold": 1.0})]
)
def test_moments_and_inverses_may_be_kept_on_the_cpu(here, place, method, options):
    corpus = BundledCorpus(20, {"facts": 0.5, "text": 0.5})
    weights = []
    for further in ({}, {"on_cpu": True}, {"on_cpu": True, "dtype": "float32"}):
        config = compose(f"method={method}").method
        config.layers, config.value.steps = [0, 1], 3
        config.contexts = {"_target_": config.contexts._target_, "fixed": ["The river. "]}
        config.update(options)
        moments = SecondMoments(corpus, ridge=0.1, **further)
        model = rounded("llama", torch.float32, torch.float32, place.device)
        module = instantiate(config, language_model=model, second_moments=moments, _convert_="all")
        stream = BundledWorld(num_edits=4, protocol="sequential_batched", batch_size=2)
        place.trainer(PRUNE(1.2)).fit(module, datamodule=stream)
        module.to(place.device)  # from where the Trainer leaves it
        expected = "cpu" if further else place.device.type
        for held in (*module.moments.values(), *module.protected._inverses.values()):
            assert {t.device.type for t in vars(held).values() if isinstance(t, torch.Tensor)} == {expected}
        weights.append([matrix.weight().cpu() for matrix in module.edited_matrices().values()])
        originals = [matrix.original().cpu() for matrix in module.edited_matrices().values()]
    for other in weights[1:]:
        for ours, theirs, original in zip(weights[0], other, originals, strict=True):
            assert float((ours - theirs).norm()) < 1e-4 * float((ours - original).norm())


# -- what leaves the device -------------------------------------------------------------------------------------------
def edited(place: Place, dtype: torch.dtype):
    """Return a module on the device after a batch of MEMIT in two layers, and its requests."""
    config = compose("method=memit").method
    config.layers, config.value.steps = [0, 1], 4
    config.contexts = {"_target_": config.contexts._target_, "fixed": ["The river. "]}
    model = rounded("llama", dtype, dtype, place.device)
    moments = test_export.SecondMoments(None)
    module = instantiate(config, language_model=model, second_moments=moments, _convert_="all")
    stream = BundledWorld(num_edits=4, protocol="sequential_batched", batch_size=2)
    place.trainer(PRUNE(1.2)).fit(module, datamodule=stream)
    return module, stream.requests


@pytest.mark.parametrize(("place", "dtype"), cases())
def test_exports_are_rebuilt_on_the_cpu(here, place, dtype, tmp_path):
    base = rounded("llama", dtype, dtype, torch.device("cpu"))
    base.model.save_pretrained(tmp_path / "base")
    module, requests = edited(place, dtype)
    source = test_export.source_of(module, requests, tmp_path / "base")
    for kind in test_export.FORMATS:
        export(source, tmp_path / kind, kind)
    live = {name: matrix.parameter.detach().cpu() for name, matrix in module.edited_matrices().items()}
    full = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(full[name], weight) for name, weight in live.items())
    apply_delta(base.model, tmp_path / "delta")
    for name, weight in live.items():
        ours = base.model.get_parameter(name).detach().double()
        assert float((ours - weight.double()).norm()) <= torch.finfo(dtype).eps * float(weight.double().norm())
        assert not torch.equal(weight, module.edited_matrices()[name].original().cpu())


@pytest.mark.parametrize(("place", "dtype"), cases())
def test_a_module_moves_after_fit_and_edits_go_on(here, place, dtype):
    module, requests = edited(place, dtype)
    module.trainer = None
    weights = {name: matrix.weight().cpu() for name, matrix in module.edited_matrices().items()}
    staying = module.compute_update(requests[:2])[0]
    staying = {name: update.dense().cpu() for name, update in staying.items()}
    module.to("cpu")
    assert {path: value.device.type for path, value in reachable(module) if value.device.type != "cpu"} == {}
    assert all(torch.equal(matrix.weight(), weights[name]) for name, matrix in module.edited_matrices().items())
    moved = module.compute_update(requests[:2])[0]
    for name, update in moved.items():
        assert float((update.dense() - staying[name]).norm()) <= 2 * tolerance(dtype) * float(staying[name].norm())
    module.edit(requests[:2])
    module.run.settle()


# -- the job itself ---------------------------------------------------------------------------------------------------
JOB = ("trainer=gpu", "method.value.steps=4", "evaluation=editing", "control=false", "progress=false")


@pytest.mark.parametrize("place", [APART, GPU])
def test_a_module_stays_on_its_device_after_a_run(here, place):
    model = rounded("llama", torch.float32, torch.float32, place.device)
    module = test_ledger.CaseEdits(model, [1])
    fit(place.trainer(), module, BundledWorld(num_edits=2))
    devices = {path: value.device.type for path, value in reachable(module) if value.device.type != place.device.type}
    assert devices == {}


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def assert_rebuilt_without_a_gpu(run: Path, folder: Path) -> None:
    """Export a run from its ledger in a process that sees no GPU; the weights are those that the run exported."""
    command = [sys.executable, "-m", "prune_lightning.export", str(run), "--to", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | NO_GPU)
    assert done.returncode == 0, done.stderr
    live, ours = (load_file(at / "model.safetensors") for at in (run / "export" / "full", folder))
    assert ours.keys() == live.keys()
    for name, weight in live.items():
        assert float((ours[name] - weight).norm()) <= 1e-5 * float(weight.norm())


@pytest.mark.gpu
def test_a_run_on_the_gpu_is_rebuilt_where_there_is_none(tmp_path):
    done = train(*JOB, "method=alphaedit", f"hydra.run.dir={tmp_path / 'run'}", "export=full", "data.num_edits=12")
    assert done.returncode == 0, done.stderr
    assert_rebuilt_without_a_gpu(tmp_path / "run", tmp_path / "rebuilt")


@pytest.mark.gpu
def test_a_run_on_the_gpu_goes_on_where_there_is_none(tmp_path):
    run = tmp_path / "run"
    done = train(*JOB, "method=memit", f"hydra.run.dir={run}", "data.num_edits=12")
    assert done.returncode == 0, done.stderr
    done = train(f"resume={run}", "trainer=cpu", "data.num_edits=16", "export=full", **NO_GPU)
    assert done.returncode == 0, done.stderr
    assert len(Ledger.open(run / "ledger").lines) == 16
    assert_rebuilt_without_a_gpu(run, tmp_path / "rebuilt")


@pytest.mark.gpu
def test_one_process_with_a_divided_model_gives_the_weights_of_a_whole_one(tmp_path):
    """FSDP2 over NCCL: gathering, writing back and exporting, as far as one GPU can show them."""
    exported = []
    for trainer in ("gpu", "fsdp2"):
        run = tmp_path / trainer
        words = [*JOB[1:], f"trainer={trainer}", "trainer.accelerator=gpu", "trainer.devices=1", "method=memit"]
        done = train(*words, f"hydra.run.dir={run}", "export=full", "data.num_edits=4")
        assert done.returncode == 0, done.stderr
        exported.append(load_file(run / "export" / "full" / "model.safetensors"))
    whole, divided = exported
    assert whole.keys() == divided.keys()
    for name, weight in whole.items():
        assert float((divided[name] - weight).norm()) <= 1e-5 * float(weight.norm())


@pytest.mark.gpu
def test_an_editor_on_the_gpu_is_opened_on_the_cpu(tmp_path):
    fact = {"subject": "France", "prompt": "The capital of France is", "target_new": "Rome"}
    other = {"subject": "Spain", "prompt": "The capital of Spain is", "target_new": "Oslo"}

    def weights(editor, device):
        matrices = editor._session.module.edited_matrices()
        assert {matrix.weight().device.type for matrix in matrices.values()} == {device}
        return {name: matrix.weight().cpu() for name, matrix in matrices.items()}

    def same(found):
        return all(float((found[name] - weight).norm()) <= 1e-5 * float(weight.norm()) for name, weight in once.items())

    with Editor("bundled", "memit", "prune", device="cuda", progress=False) as editor:
        editor.edit(fact)
        once, answer = weights(editor, "cuda"), editor.ask(fact["prompt"])
        editor.edit(other)
        editor.undo()
        assert same(weights(editor, "cuda"))
        assert all(len(spectrum.before) for spectrum in editor.history.spectra())
        editor.save(tmp_path / "saved")
    with Editor.open(tmp_path / "saved", device="cpu", progress=False) as opened:
        assert same(weights(opened, "cpu"))
        assert opened.ask(fact["prompt"]) == answer


# -- the script that measures on a GPU --------------------------------------------------------------------------------
def test_the_default_parts_of_the_script_fit_a_command_of_ten_minutes():
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r'part "?\w+.* "\$\{SECONDS_(\w+):-(\d+)\}', script)}
    limits["d"] *= len(re.search(r"METHODS_d:-([\w ]+)", script)[1].split())
    assert re.search(r"PARTS:-([\w ]+)", script)[1] == "a b c d f"
    (whole,) = re.findall(r"SECONDS_all:-(\d+)", script)
    assert sum(limits[name] for name in ("a", "b", "smollm2", "restraint", "editing", "d", "f")) <= int(whole) <= 520


def test_the_table_shows_what_there_is_of_parts_that_were_stopped(tmp_path):
    whole = {"arguments": ["trainer=gpu"], "wall_s": 40.2, "phases": {"edit": 30.1, "load": 0.2}}
    (tmp_path / "job.json").write_text(json.dumps(whole))
    stopped = {"arguments": ["model=smollm2"], "wall_s": 60.0, "num_requests": 120, "complete": False}
    (tmp_path / "smollm2.json").write_text(json.dumps(stopped))
    (tmp_path / "restraint.json").write_text('{"records": [')
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_table.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    assert "40.2 s: edit 30.1 " in lines["job"]
    assert "60.0 s: stopped after 120 edits" in lines["smollm2"]
    assert "cannot be read" in lines["restraint"]
