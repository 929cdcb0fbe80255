"""The life of a run: a step is all or nothing, the end is recorded, and a resumed run is where it was."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from conftest import quiet_trainer
from test_guards import Requests
from test_ledger import ROUNDING, CaseEdits, Keep, relative
from test_restraint import BASE

from prune_lightning.callbacks import PRUNE, EditLedger, EditLog, Guards
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger, rebuild
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.edit_run import Phase
from prune_lightning.types import EditBatch, LowRankUpdate

SCHEDULES = {
    "end": lambda: PRUNE(BASE, schedule="end"),
    "every 4": lambda: PRUNE(BASE, schedule="every_n", every_n=4),
    "every 4, restrained": lambda: PRUNE(BASE, schedule="every_n", every_n=4, accumulate="restrained"),
}


class StopAfter(L.Callback):
    """Ends the stream early, as a guard does."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or pl_module.run.num_steps == self.steps


def run(tiny, numbers, *callbacks, done=()):
    module = CaseEdits(tiny("llama"), [1])
    stream = Requests(numbers, done=done)
    quiet_trainer(*callbacks).fit(module, datamodule=stream)
    return module


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_restraint_does_at_an_early_end_is_in_the_ledger(name, tiny, tmp_path):
    module = run(tiny, range(9), SCHEDULES[name](), StopAfter(6), EditLedger(tmp_path, snapshot_every=10**6))
    live = module.matrix().weight()
    unrestrained = run(tiny, range(6)).matrix().weight()
    assert float((live - unrestrained).norm() / live.norm()) > 0.01
    ledger, fresh = Ledger.open(tmp_path), CaseEdits(tiny("llama"), [1])
    assert rebuild(fresh, ledger).replayed == 0
    assert torch.equal(fresh.matrix().weight(), live)
    for path in tmp_path.glob("snapshot_*"):
        path.unlink()
    again, restraint = CaseEdits(tiny("llama"), [1]), SCHEDULES[name]()
    restraint.attach(again)
    assert rebuild(again, ledger, restrain=restraint.restrain).replayed == 7  # six steps and the end
    assert relative(again, live) <= ROUNDING


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_finished_run_that_is_extended_equals_one_planned_that_long(name, tiny, tmp_path):
    keep = Keep()
    straight = run(tiny, range(9), SCHEDULES[name](), keep)
    run(tiny, range(6), SCHEDULES[name](), EditLedger(tmp_path))
    ledger = Ledger.open(tmp_path)
    assert ledger.finish_line is not None
    again = Keep()
    resumed = run(tiny, range(9), SCHEDULES[name](), again, EditLedger(tmp_path, ledger=ledger), done=ledger.sizes)
    assert resumed.num_requests == 9
    for ours, theirs in zip(again.weights, keep.weights[6:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= ROUNDING
    assert relative(resumed, straight.matrix().weight()) <= ROUNDING


class RefuseAll(Guards):
    """Refuses every edit from one on."""

    def __init__(self, start):
        super().__init__()
        self.start = start

    def setup(self, trainer, pl_module, stage):
        pl_module.run.register_veto(lambda step: "no" if step.requests[0].case_id >= self.start else None)

    def teardown(self, trainer, pl_module, stage):
        pass


def test_what_is_pending_survives_a_resume(tiny, tmp_path):
    """Also where every edit that is left is refused: the final model is restrained all the same."""
    expected = run(tiny, range(5), PRUNE(BASE, schedule="end")).matrix().weight()
    run(tiny, range(7), PRUNE(BASE, schedule="end"), StopAfter(5), EditLedger(tmp_path))
    ledger, restraint, seen = Ledger.open(tmp_path), PRUNE(BASE, schedule="end"), []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with pl_module.run.evaluation_view():
                seen.append(pl_module.matrix().weight().clone())

    callbacks = [restraint, RefuseAll(5), Look(), EditLedger(tmp_path, ledger=ledger)]
    module = run(tiny, range(7), *callbacks, done=ledger.sizes)
    assert len(seen) == 2
    for weight in (*seen, module.matrix().weight()):
        assert float((weight - expected).norm() / expected.norm()) <= ROUNDING


def test_a_run_killed_between_its_last_step_and_its_end_is_finished_by_resuming(tiny, tmp_path):
    straight = run(tiny, range(4), PRUNE(BASE, schedule="end"), EditLedger(tmp_path))
    for name in ("finish.json", "finish.data", "snapshot_final.safetensors"):
        (tmp_path / name).unlink()
    ledger = Ledger.open(tmp_path)
    assert (ledger.finish_line, ledger.num_requests) == (None, 4)
    callbacks = [PRUNE(BASE, schedule="end"), EditLog(tmp_path / "log.jsonl"), EditLedger(tmp_path, ledger=ledger)]
    module = run(tiny, range(4), *callbacks, done=ledger.sizes)
    assert module.run.phase is Phase.FINISHED
    assert relative(module, straight.matrix().weight()) <= ROUNDING
    assert Ledger.open(tmp_path).finish_line is not None


def test_an_extended_stream_of_batches_drops_no_request():
    stream = BundledWorld(num_edits=5, protocol="sequential_batched", batch_size=2)
    stream.setup()
    assert [len(batch.requests) for batch in stream.batches()] == [2, 2, 1]
    longer = BundledWorld(num_edits=8, protocol="sequential_batched", batch_size=2, done=(2, 2, 1))
    longer.setup()
    assert [len(batch.requests) for batch in longer.batches()] == [2, 2, 1, 2, 1]
    left = [request for batch in longer.train_dataloader() for request in batch.requests]
    assert left == longer.requests[5:]
    assert longer.requests[:5] == stream.requests
    whole = [request for batch in longer.from_start().train_dataloader() for request in batch.requests]
    assert whole == longer.requests


class Wrong(EditingModule):
    """Gets its second matrix, a name or its details wrong."""

    def __init__(self, model, how):
        super().__init__(model, [0, 1])
        self.how = how

    def compute_update(self, requests):
        good = [torch.ones(32, 1, dtype=torch.float64)] * 2
        names = list(self.edited_matrices())
        updates = {name: LowRankUpdate(*good) for name in names}
        if self.how == "shape":
            updates[names[1]] = LowRankUpdate(torch.ones(31, 1, dtype=torch.float64), good[1])
        if self.how == "name":
            updates["model.layers.1.mlp.typo.weight"] = LowRankUpdate(*good)
        return updates, [{}] * (2 if self.how == "details" else len(requests))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shape", r"expected an update of shape \(32, 32\) for .*layers\.1\..*, but got \(31, 32\)"),
        ("name", r"updates 'model\.layers\.1\.mlp\.typo\.weight', which is not among what it edits"),
        ("details", "expected details of 1 requests, but got 2"),
    ],
)
def test_a_step_that_is_wrong_writes_nothing(how, words, tiny):
    module = Wrong(tiny("llama"), how)
    before = [matrix.weight().clone() for matrix in module.edited_matrices().values()]
    request = next(iter(Requests([1]).records()))
    with pytest.raises(ValueError, match=words):
        module.edit([request])
    for weight, matrix in zip(before, module.edited_matrices().values(), strict=True):
        assert torch.equal(matrix.weight(), weight)
    assert module.num_requests == 0


class Chatty(CaseEdits):
    """Reports details by names that the log has for itself."""

    def compute_update(self, requests):
        updates, _ = super().compute_update(requests)
        return updates, [{"applied": False, "num_requests": 99, "seconds": -1.0}]


def test_details_cannot_overwrite_what_the_log_says(tiny, tmp_path):
    stream = Requests(range(2))
    module = Chatty(tiny("llama"), [1])
    quiet_trainer(EditLog(tmp_path / "edits.jsonl"), EditLedger(tmp_path / "ledger")).fit(module, datamodule=stream)
    lines = [json.loads(text) for text in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [line["num_requests"] for line in lines] == [1, 2]
    assert all(line["applied"] and line["seconds"] >= 0 for line in lines)
    assert lines[0]["details"] == {"applied": False, "num_requests": 99, "seconds": -1.0}
    assert [line["applied"] for line in Ledger.open(tmp_path / "ledger").lines] == [True, True]


def test_the_order_of_callbacks_is_checked(tiny, tmp_path):
    with pytest.raises(UserError, match="list PRUNE before EditLog"):
        run(tiny, range(2), EditLog(None), PRUNE(BASE))
    with pytest.raises(UserError, match="list Guards before EditLedger"):
        run(tiny, range(2), EditLedger(tmp_path), Guards())


def test_other_settings_are_refused_before_anything_is_computed(tiny, tmp_path):
    base = {"restraint_options": {"base": 1.2, "schedule": "each"}, "seed": 0}
    run(tiny, range(3), EditLedger(tmp_path, base))
    ledger = Ledger.open(tmp_path)
    other = {**base, "restraint_options": {"base": 2.0, "schedule": "each"}}
    with pytest.raises(UserError, match=r"other settings: restraint\.base was 1\.2 and is 2\.0 now"):
        run(tiny, range(5), EditLedger(tmp_path, other, ledger), done=ledger.sizes)


def test_a_batch_without_requests_ends_the_epoch(tiny):
    module = CaseEdits(tiny("llama"), [1])
    loader = torch.utils.data.DataLoader([EditBatch(())], batch_size=None)
    quiet_trainer().fit(module, loader)
    assert (module.num_requests, module.run.phase) == (0, Phase.NEW)


def test_requests_that_are_looked_at_together_depend_on_their_place_in_the_stream_alone(tiny):
    """Wherever a process starts, the window of a request is the same: what is computed for it rounds the same way."""
    stream = Requests(range(40))
    stream.setup()
    windows = {}

    class Note(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (request,) = batch.requests
            window = [one.case_id for one in pl_module.stream_window(request, 16)]
            assert windows.setdefault(request.case_id, window) == window

    for done in ((), [1] * 7, [1] * 30):
        module, rest = CaseEdits(tiny("llama"), [1]), Requests(range(40), done=done)
        module.run.move_to(len(done), len(done))
        quiet_trainer(Note()).fit(module, datamodule=rest)
    assert [windows[place] for place in (0, 15, 16, 39)] == [
        list(range(16)),
        list(range(16)),
        list(range(16, 32)),
        list(range(32, 40)),
    ]
