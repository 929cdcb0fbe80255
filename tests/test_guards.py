"""Guards: what they find, what becomes of the edit, and that nothing else is harmed."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from conftest import BUNDLED, quiet_trainer
from prune_lightning.callbacks.sentinel import Sentinel
from prune_lightning.callbacks.update_guards import KeyGuard, NormGuard, ValueGuard
from test_fuzz import command_line
from test_restraint import RandomEdits

from prune_lightning.callbacks import PRUNE, RECT, EditLedger, EditLog, Guards, SubspaceFilter
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import DenseUpdate, EditRequest, LowRankUpdate

BASE = 1.2
HUGE = 1e3


class Requests(EditStream):
    """Edits by number."""

    def __init__(self, numbers, **kwargs):
        super().__init__(**kwargs)
        self.numbers = numbers

    def records(self):
        for number in self.numbers:
            yield EditRequest(number, f"Ann {number}", f"Ann {number} is", "old")


class Counted(RandomEdits):
    """Random small updates, by case; remembers how many it wrote, and what the weights were at each of them."""

    planted: dict = {}  # noqa: RUF012 - by case, what becomes of its update

    def compute_update(self, requests):
        name = self.language_model.rewrite_name(1)
        generator = torch.Generator().manual_seed(int(requests[0].case_id))
        shape = self.edited_matrices()[name].original().shape
        left, right = (torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in shape)
        update, detail = LowRankUpdate(left, 0.01 * right), {"key_ratio": 1.0}
        change = self.planted.get(requests[0].case_id)
        update, detail = change(update, detail) if change else (update, detail)
        return {name: update.to(self.language_model.device)}, [detail]

    def forget(self):
        self.remembered = torch.zeros_like(self.language_model.rewrite_module(1).weight[0])

    def prepare(self):
        self.forget()

    def observe(self, requests):
        return {"row": self.language_model.rewrite_module(1).weight[0].detach().clone()}

    def remember(self, observed):
        self.remembered += observed["row"]  # in place, as the recursive inverses are

    def memory(self):
        return {"remembered": self.remembered}

    def load_memory(self, memory):
        self.remembered = memory["remembered"].clone()


def nan(update, detail):
    return DenseUpdate(update.dense() * math.nan), detail


def huge(update, detail):
    return LowRankUpdate(HUGE * update.left, update.right), detail


def ill_posed(update, detail):
    return update, {"key_ratio": -0.01}


def stuck(update, detail):
    return update, {"losses": [3.0, 2.0, 3.0], "target_probability": 0.5}


PLANTED = {"finite": nan, "norm": huge, "key": ill_posed, "value": stuck}


def guards(**kwargs):
    given = {"norm": NormGuard(after=3), "key": KeyGuard(), "value": ValueGuard()}
    return Guards(**(given | kwargs))


def module_with(model, planted):
    module = Counted(model, [1])
    module.planted = planted
    return module


def run(module, numbers, *callbacks, done=(), trainer=None):
    stream = Requests(numbers, done=done)
    stream.setup()
    (trainer or quiet_trainer(*callbacks)).fit(module, datamodule=stream)
    return module


def state(module):
    edits = module.run.state_dict()
    tensors = {f"{name}/{key}": t for name, of in edits["parts"].items() for key, t in of.items()}
    weight = module.language_model.rewrite_module(1).weight.detach()
    return tensors | edits["memory"] | {"weight": weight}


def assert_same(module, other):
    ours, theirs = state(module), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


RESTRAINTS = {
    "prune": lambda: [PRUNE(BASE)],
    "prune_restrained": lambda: [PRUNE(BASE, accumulate="restrained")],
    "prune_every_3": lambda: [PRUNE(BASE, schedule="every_n", every_n=3)],
    "prune_end": lambda: [PRUNE(BASE, schedule="end")],
    "rect": lambda: [RECT(0.4)],
    "revive": lambda: [SubspaceFilter()],
}


@pytest.mark.filterwarnings("ignore:case 5", "ignore:the update of case")
@pytest.mark.parametrize("restraint", ["prune_restrained", "rect", "revive"])
@pytest.mark.parametrize("name", PLANTED)
def test_skipped_edit_leaves_the_stream_as_if_it_had_not_been_there(tiny, tmp_path, name, restraint):
    path, log = tmp_path / "quarantine.jsonl", tmp_path / "edits.jsonl"
    watching = guards(policy="skip", path=path)
    bad = run(
        module_with(tiny("llama"), {5: PLANTED[name]}), range(8), *RESTRAINTS[restraint](), watching, EditLog(log)
    )
    good = run(module_with(tiny("llama"), {}), [n for n in range(8) if n != 5], *RESTRAINTS[restraint]())
    assert_same(bad, good)
    assert (bad.num_requests, good.num_requests, watching.refused) == (8, 7, 1)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["guard"], line["policy"], line["num_requests"], line["request"]["case_id"]) == (name, "skip", 6, 5)
    entries = [json.loads(text) for text in log.read_text().splitlines()]
    assert [entry["applied"] for entry in entries] == [n != 5 for n in range(8)]
    assert line["reason"] in entries[5]["refused"]
    assert watching.summary()["guards"]["found"] == {name: 1}
    assert not bad.run._vetoes


def ruinous(update, detail):
    """All directions at once: what a restraint leaves of it still breaks the model."""
    generator = torch.Generator().manual_seed(0)
    return DenseUpdate(10 * torch.randn(update.dense().shape, generator=generator, dtype=torch.float64)), detail


RUINOUS = {4: ruinous}


def rolling_back(**kwargs):
    return Guards(perplexity=Sentinel(factor=3.0), policy="rollback", **kwargs)


@pytest.mark.filterwarnings("ignore:case")
@pytest.mark.parametrize("restraint", RESTRAINTS)
def test_rolled_back_edit_leaves_the_stream_as_if_it_had_not_been_there(restraint, tmp_path):
    watching, seen = rolling_back(path=tmp_path / "quarantine.jsonl"), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.run.settle()
            seen.append({name: tensor.clone() for name, tensor in state(pl_module).items()})

    log = tmp_path / "edits.jsonl"
    ledger = EditLedger(tmp_path / "ledger")
    callbacks = [*RESTRAINTS[restraint](), watching, Watch(), EditLog(log), ledger]
    bad = run(module_with(load_language_model(BUNDLED), RUINOUS), range(6), *callbacks)
    assert [reading.kept for reading in watching.readings] == [n != 4 for n in range(6)]
    assert watching.readings[4].relative > 3 or math.isnan(watching.readings[4].relative)
    assert all(torch.equal(seen[4][name], seen[3][name]) for name in seen[3])
    assert not torch.equal(seen[5]["weight"], seen[4]["weight"])
    entries = [json.loads(text) for text in log.read_text().splitlines()]
    assert [entry["applied"] for entry in entries] == [n != 4 for n in range(6)]
    assert entries[4]["refused"].startswith("perplexity: ")
    assert bad.num_requests == 6
    (line,) = map(json.loads, watching.path.read_text().splitlines())
    assert (line["guard"], line["policy"], line["num_requests"]) == ("perplexity", "rollback", 5)
    step = Ledger.open(tmp_path / "ledger").lines[4]
    assert not step["applied"]
    assert step["events"] == {bad.language_model.rewrite_name(1): []}
    if restraint != "prune_every_3":  # the schedule counts refused steps too
        good = run(
            module_with(load_language_model(BUNDLED), {}), [n for n in range(6) if n != 4], *RESTRAINTS[restraint]()
        )
        assert_same(bad, good)


class Interrupted(L.Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.num_requests == self.after:
            raise RuntimeError("interrupted")


def whole_and_resumed(model, planted, count, after, restraint, watch, folder):
    """Run a stream at once, and again with an interruption; return modules and guards."""

    def once(name, *further, ledger=None):
        watching = watch(path=folder / name / "quarantine.jsonl")
        given = *RESTRAINTS[restraint](), watching, EditLedger(folder / name / "ledger", ledger=ledger), *further
        return run(module_with(model(), planted), range(count), *given, done=[1] * (after if ledger else 0)), watching

    whole = once("whole")
    with pytest.raises(RuntimeError, match="interrupted"):
        once("again", Interrupted(after))
    lines = (folder / "again" / "quarantine.jsonl").read_text()
    resumed = once("again", ledger=Ledger.open(folder / "again" / "ledger"))
    assert (folder / "again" / "quarantine.jsonl").read_text() == lines
    assert (folder / "whole" / "quarantine.jsonl").read_text() == lines
    return whole, resumed, lines


@pytest.mark.filterwarnings("ignore:case", "ignore:the update of case")
@pytest.mark.parametrize("restraint", ["prune", "prune_every_3", "rect"])
def test_resumed_run_keeps_quarantine_figures_and_weights(restraint, tmp_path):
    (whole, watching), (resumed, again), lines = whole_and_resumed(
        lambda: load_language_model(BUNDLED), {2: nan, 3: ruinous}, 6, 4, restraint, rolling_back, tmp_path
    )
    assert_same(resumed, whole)
    assert len(lines.splitlines()) == 2
    assert again.summary() == watching.summary()


def larger(update, detail):
    return LowRankUpdate(300 * update.left, update.right), detail


@pytest.mark.filterwarnings("ignore:the update of case", "ignore:case")
@pytest.mark.parametrize("restraint", ["prune", "prune_every_3", "prune_restrained"])
def test_ledger_that_ends_with_refused_steps_is_resumed_where_corrections_are_recomputed(tiny, restraint, tmp_path):
    planted = dict.fromkeys(range(13), larger) | {0: nan, 9: nan, 10: nan}
    (whole, _), (resumed, _), _ = whole_and_resumed(
        lambda: tiny("llama"), planted, 13, 11, restraint, lambda path: Guards(path=path, finite="skip"), tmp_path
    )
    lines = Ledger.open(tmp_path / "again" / "ledger").lines
    forms = [form for line in lines for events in line["events"].values() for _, form in events]
    assert "recomputed" in forms
    assert_same(resumed, whole)


@pytest.mark.filterwarnings("ignore:case")
def test_warned_edit_is_written_and_counted(tiny, tmp_path):
    watching = guards(path=tmp_path / "quarantine.jsonl")
    with pytest.warns(UserWarning, match=r"case 4: the update is .* \(norm\)"):
        warned = run(module_with(tiny("llama"), {4: huge, 5: ill_posed, 6: stuck}), range(8), watching)
    assert_same(warned, run(module_with(tiny("llama"), {4: huge, 5: ill_posed, 6: stuck}), range(8)))
    assert watching.summary()["guards"]["found"] == {"norm": 1, "key": 1, "value": 1}
    assert {finding["guard"] for finding in watching.findings} == {"norm", "key", "value"}
    assert not watching.path.exists()


@pytest.mark.filterwarnings("ignore:case", "ignore:the update of case")
@pytest.mark.parametrize("name", PLANTED)
def test_stop_ends_the_run_with_the_edit_left_out(tiny, tmp_path, name):
    watching, log = guards(policy="stop", path=tmp_path / "quarantine.jsonl"), EditLog(tmp_path / "edits.jsonl")
    with pytest.warns(UserWarning, match="the run ends after 6 edits"):
        stopped = run(module_with(tiny("llama"), {5: PLANTED[name]}), range(9), PRUNE(BASE), watching, log)
    assert_same(stopped, run(module_with(tiny("llama"), {}), range(5), PRUNE(BASE)))
    assert stopped.num_requests == len(log.path.read_text().splitlines()) == 6
    assert watching.summary()["guards"]["stopped"].startswith(f"{name}: ")
    assert len(watching.path.read_text().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:case", "ignore:the run ends")
@pytest.mark.parametrize("collapse", ["warn", "stop"])
def test_collapse_is_several_looks_in_a_row(bundled, collapse):
    watching = Guards(perplexity=Sentinel(every_n=1, factor=3.0, readings=3), collapse=collapse)
    module = run(module_with(bundled, {2: huge}), range(8), watching)
    above = [not reading.relative <= 3 for reading in watching.readings]
    assert above == [n >= 2 for n in range(len(above))]
    assert watching.found["collapse"] == 1
    assert module.num_requests == (5 if collapse == "stop" else 8)
    assert (watching.stopped is not None) == (collapse == "stop")


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="policy"):
        Guards(policy="rolback")
    with pytest.raises(UserError, match="policy"):
        NormGuard(policy="ignore")
    with pytest.raises(UserError, match="it can warn, rollback or stop"):
        Sentinel(policy="skip")
    with pytest.raises(UserError, match="factor"):
        NormGuard(factor=1)
    with pytest.raises(UserError, match="cannot be read"):
        Sentinel(path="nowhere.txt")


@pytest.mark.parametrize("broken", [{"subject": "Bob"}, {"target_new": " "}])
def test_requests_that_cannot_be_edits_do_not_reach_the_guards(broken):
    with pytest.raises(UserError):
        EditRequest(**({"case_id": 1, "subject": "Ann", "prompt": "Ann is", "target_new": "old"} | broken))


def test_the_control_run_leaves_out_what_a_guard_refused(tmp_path):
    """It is compared with the run, so it writes the same edits."""
    options = ["evaluation=editing", "progress=false", "data.num_edits=2", "method.value.steps=1", "restraint=prune"]
    options += ["callbacks.guards.value.policy=skip", "callbacks.guards.value.least_probability=0.9999"]
    assert command_line(tmp_path, *options) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["guards"]["refused"] == 2
    for final in (summary["final"], summary["control"]["final"]):
        assert final["spectrum/relative_change"] == 0.0
