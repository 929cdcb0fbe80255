"""What a stopped, resumed or partly undone stream leaves, against dense fp64 sums of its requests' updates.

That a resumed run ends like a straight one says nothing about a fault that both share. Here the expected weights are
computed from the requests alone, without the ledger.
"""

from __future__ import annotations

import math

import lightning as L
import pytest
import reference_editors as reference
import torch
from conftest import dense_space, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_edit_run import run
from test_ledger import RESTRAINTS, CaseEdits, Given, fresh, written
from test_reference_editors import TOLERANCE, batches, build, by_hand, distance
from test_restraint import BASE, edits, fit
from test_restraint_conformance import filtered, law_applied, mask
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE, EditLedger
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.ledger import Ledger, without

COUNT = 11


def update(case: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case)
    left, right = (torch.randn(32, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    return left @ right.T


def dense(name: str, original: torch.Tensor, cases: list[int]) -> torch.Tensor:
    """Return the weight after the cases, one after another, under a restraint of ``RESTRAINTS``."""

    def law(sigma, top):
        return math.log(sigma / top) / math.log(BASE) + top

    change, shown = torch.zeros_like(original), torch.zeros_like(original)
    space = dense_space(*Given().factors(None, ["x"])["x"], 0.9) if name == "low curvature" else None
    for place, case in enumerate(cases, start=1):
        step = update(case)
        if name == "rect":
            step = step * mask(step, original + change, 0.2)
        elif name == "low curvature":
            step = space(step)
        change = change + step
        last = place == len(cases)
        if name in ("none", "rect", "low curvature"):
            shown = change
        elif name == "prune restrained":
            change = shown = law_applied(change, original, law, guard=True)
        elif name == "revive" or (name == "sphere" and (last or place % 3 == 0)):
            shown = filtered(name, change, original)
        elif name == "sphere":
            continue
        elif name == "prune" or last or (name == "prune every 3" and place % 3 == 0):
            shown = law_applied(change, original, law, guard=True)
    return original + shown


def close(weight: torch.Tensor, expected: torch.Tensor, original: torch.Tensor) -> bool:
    return float((weight - expected).norm()) < 1e-11 * float((expected - original).norm())


@pytest.mark.parametrize("snapshot_every", [1, 10**6])
@pytest.mark.parametrize("name", RESTRAINTS)
def test_a_resumed_stream_leaves_the_dense_sum(name, snapshot_every, tiny, tmp_path):
    """From a snapshot, or from a replay of its steps."""

    def restraint():
        made = RESTRAINTS[name]()
        return [made] if made else []

    run(tiny, range(5), *restraint(), EditLedger(tmp_path, snapshot_every=snapshot_every))
    ledger = Ledger.open(tmp_path)
    callbacks = [*restraint(), EditLedger(tmp_path, ledger=ledger, snapshot_every=snapshot_every)]
    module = run(tiny, range(COUNT), *callbacks, done=ledger.sizes)
    original = module.matrix().original()
    assert close(module.matrix().weight(), dense(name, original, list(range(COUNT))), original)


@pytest.mark.parametrize("name", RESTRAINTS)
def test_a_stream_without_some_edits_leaves_the_dense_sum_of_the_others(name, tiny, tmp_path):
    restraint, again = RESTRAINTS[name](), RESTRAINTS[name]()
    written(tiny, tmp_path, edits(COUNT), *([restraint] if restraint else []))
    module, taken_back = fresh(tiny, again), {2, 3, 8}
    kept = [case for case in range(COUNT) if case + 1 not in taken_back]

    def after_step():
        if again:
            again.after_step(module.run.num_steps)

    without(module, Ledger.open(tmp_path).steps(module.device), taken_back, after_step)
    module.run.finish()
    original = module.matrix().original()
    assert close(module.matrix().weight(), dense(name, original, kept), original)


@pytest.mark.parametrize("restraint", ["prune", "prune restrained", "revive"])
def test_a_step_that_is_taken_back_leaves_the_dense_sum_of_the_others(restraint, tiny):
    class TakeBackThird(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = pl_module.run.backup()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                pl_module.run.roll_back(self.before, "for the test")

    module = CaseEdits(tiny("llama"), [1])
    fit(module, edits(6), RESTRAINTS[restraint](), TakeBackThird())
    original = module.matrix().original()
    assert close(module.matrix().weight(), dense(restraint, original, [0, 1, 3, 4, 5]), original)


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("method", ["memit_past", "alphaedit"])
def test_a_resumed_method_remembers_the_keys_of_the_batches_before(method, replayed, tmp_path):
    done = 2
    _, originals, expected = by_hand(method, "gpt2")
    quiet_trainer(EditLedger(tmp_path)).fit(build(method, "gpt2"), DataLoader(batches()[:done], batch_size=None))
    module = build(method, "gpt2")
    for path in tmp_path.glob("snapshot_*"):
        if replayed:
            path.unlink()
    ledger = EditLedger(tmp_path, ledger=Ledger.open(tmp_path))
    quiet_trainer(ledger).fit(module, DataLoader(batches()[done:], batch_size=None))
    for matrix, other, original in zip(module.edited_matrices().values(), expected[-1], originals, strict=True):
        assert distance(matrix.weight(), other, original) < TOLERANCE["gpt2"]


def test_a_checkpoint_holds_the_keys_of_the_batches_before(tmp_path):
    _, originals, expected = by_hand("alphaedit", "gpt2")

    save = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    straight = quiet_trainer(save, enable_checkpointing=True)
    straight.fit(build("alphaedit", "gpt2"), DataLoader(batches(), batch_size=None))
    module, path = build("alphaedit", "gpt2"), tmp_path / "two.ckpt"
    # Lightning counts on but restarts the loader.
    loader = DataLoader(batches()[2:] + batches()[:2], batch_size=None)
    quiet_trainer().fit(module, loader, ckpt_path=path, weights_only=True)
    for matrix, other, original in zip(module.edited_matrices().values(), expected[-1], originals, strict=True):
        assert distance(matrix.weight(), other, original) < TOLERANCE["gpt2"]


@pytest.mark.parametrize("method", ["memit_past", "r_rome"])
def test_layers_are_edited_on_the_restrained_weights(method):
    """Under PRUNE, keys, hidden states and outputs are those of the restrained model, and so are remembered keys."""
    settings = reference.Settings(mom2_update_weight=1e-3, moment_ridge=1e-3)  # large updates
    editor, base = reference.ReferenceEditor(method, "gpt2", settings), 30.0
    originals = [editor.weight(layer) for layer in editor.settings.layers]
    sums = [torch.zeros_like(original) for original in originals]

    def law(sigma, top):
        return math.log(sigma / top) / math.log(base) + top

    for batch in reference.BATCHES:
        before = [editor.weight(layer) for layer in editor.settings.layers]
        editor.write_batch(batch)
        for layer, original in zip(editor.settings.layers, originals, strict=True):
            now = editor.weight(layer)
            sums[layer] = sums[layer] + now - before[layer]
            editor.write(layer, original + law_applied(sums[layer], original, law, guard=True) - now)
        editor.remember(batch)
    module, withheld = build(method, "gpt2", settings), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            withheld.append([matrix.withheld is not None for matrix in pl_module.edited_matrices().values()])

    quiet_trainer(PRUNE(base), Look()).fit(module, DataLoader(batches(), batch_size=None))
    assert any(withheld[0]), "the restraint acts before the second batch"
    for matrix, layer in zip(module.edited_matrices().values(), editor.settings.layers, strict=True):
        assert distance(matrix.weight(), editor.weight(layer), originals[layer]) < TOLERANCE["gpt2"]


def test_a_refused_step_does_not_put_off_the_restraint_of_those_before(tiny):
    """Of every two steps, the second one is refused: what the first one wrote is restrained all the same."""

    class SecondIsRefused(CaseEdits):
        def compute_update(self, requests):
            updates, details = super().compute_update(requests)
            if requests[0].case_id == 1:
                next(iter(updates.values())).left[0] = float("nan")
            return updates, details

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.matrix().weight().clone())

    module, seen = SecondIsRefused(tiny("llama"), [1]), []
    with pytest.warns(UserWarning, match="not finite"):
        fit(module, edits(3), PRUNE(BASE, schedule="every_n", every_n=2), Look())
    original = module.matrix().original()
    assert close(seen[0], original + update(0), original)
    assert close(seen[1], dense("prune", original, [0]), original)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stream_that_begins_behind_earlier_edits_hands_out_all_others_in_order(size):
    protocol = "sequential" if size == 1 else "sequential_batched"
    options = {"num_edits": 9, "protocol": protocol, "batch_size": size}
    whole = BundledWorld(**options)
    whole.setup()
    wanted = [request.case_id for request in whole.requests]
    for done in ((), (size,), (size, size), (1, 1), (2, 3)):
        stream = BundledWorld(**options, done=done)
        stream.setup()
        handed = [[request.case_id for request in batch.requests] for batch in stream.train_dataloader()]
        left = wanted[sum(done) :]
        assert handed == [left[start : start + size] for start in range(0, len(left), size)]
    loader = whole.train_dataloader()
    loader.load_state_dict({"next": 1})
    assert [batch.requests for batch in loader] == [batch.requests for batch in list(whole.train_dataloader())[1:]]
