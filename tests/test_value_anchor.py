"""Norm anchors of values, their guard, and the early stop, against dense statements."""

from __future__ import annotations

import pytest
import reference_editors as reference
import torch
from conftest import quiet_trainer
from prune_lightning.callbacks.update_guards import AnchorGuard
from test_reference_editors import batches, build
from test_values import rows_of
from torch.utils.data import DataLoader

from prune_lightning.callbacks import EditLedger
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger
from prune_lightning.methods.r_rome import RROME
from prune_lightning.methods.value import ValueOptions, Values, optimise_values
from prune_lightning.methods.value_anchor import mean_norm, rescaled, written_values
from prune_lightning.methods.value_problem import Layout, ShiftSite, WholeForward
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import capture
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoments

LAYER = 1
BATCH = batches()[1].requests


def module_of(method, **options):
    module = build(method, "gpt2", reference.Settings(layers=(LAYER,)))
    module.value = ValueOptions(steps=4, **options)
    module.prepare()
    return module


def read(module, request):
    """Return the matrix's and the block's output at the clean prompt's subject, from a plain pass."""
    model = module.language_model
    ids = model.tokens.encode(request.prompt[: request.subject_end])
    with torch.no_grad(), capture(outputs=[model.rewrite_module(LAYER), model.block(LAYER)], stop=False) as seen:
        model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    return seen.outputs[0][0, -1], seen.outputs[1][0, -1]


def asked(module, values):
    """Return what the matrix is asked for: its output now plus what the target adds."""
    site, found = module.value_sites()[0], []
    for request, target in zip(BATCH, values.target, strict=True):
        output, block = read(module, request)
        found.append(target if site.at == "mlp" else output + target - block)
    return torch.stack(found)


@pytest.mark.parametrize("method", ["r_rome", "memit"])
def test_mean_and_cap_set_the_norm_and_keep_the_direction(method):
    plain = module_of(method)
    site = plain.value_sites()[0]
    before = asked(plain, plain.optimise(BATCH, site))
    norms = before.norm(dim=1)
    anchor = float(norms.sort().values[1])  # of three: one is below, one above
    for kind in ("mean", "cap"):
        values = module_of(method, anchor=kind, anchor_norm=anchor).optimise(BATCH, site)
        after = asked(plain, values)
        wanted = norms.clamp_max(anchor) if kind == "cap" else torch.full_like(norms, anchor)
        assert torch.allclose(after, before * (wanted / norms)[:, None], rtol=0, atol=1e-10)
        ratios = torch.tensor([detail["norm_ratio"] for detail in values.details])
        assert torch.allclose(ratios.double(), norms / anchor, rtol=1e-6)


@pytest.mark.parametrize("method", ["r_rome", "memit"])
def test_own_is_the_norm_that_the_shift_gives_on_the_unedited_model(method):
    module = module_of(method, anchor="own")
    site = module.value_sites()[0]
    unscaled = module_of(method).optimise(BATCH, site)
    assert torch.allclose(module.optimise(BATCH, site).target, unscaled.target, atol=1e-12)
    unedited = torch.stack([read(module, request)[0] for request in BATCH])
    ((_, matrix),) = module.edited_matrices().items()
    module.edit(batches()[0].requests)
    edited = matrix.weight().clone()
    values = module.optimise(BATCH, site)
    assert torch.equal(matrix.weight(), edited)
    module.value = ValueOptions(steps=4)
    shift = module.optimise(BATCH, site)
    shift = shift.target - shift.reference
    assert float((unedited - torch.stack([read(module, r)[0] for r in BATCH])).norm()) > 1e-3
    assert torch.allclose(asked(module, values).norm(dim=1), (unedited + shift).norm(dim=1), rtol=1e-10)


def test_the_shift_of_a_block_is_divided_by_the_architectures_factor():
    torch.manual_seed(0)
    reference_, target, output = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    values = Values(target, reference_, [{} for _ in range(4)])
    written = written_values(values, output, multiplier=3.0)
    assert torch.allclose(output + (target - reference_) / 3, written)
    again = rescaled(values, written, torch.full((4,), 2.0, dtype=torch.float64), "mean", multiplier=3.0)
    norms = written_values(again, output, multiplier=3.0).norm(dim=1)
    assert torch.allclose(norms, torch.full((4,), 2.0, dtype=torch.float64))


def test_the_mean_leaves_out_the_largest_twentieth():
    values = [torch.tensor([float(i), 0.0]) for i in (1000, *range(1, 20))]
    assert mean_norm(values) == pytest.approx(10.0)
    assert mean_norm(values[1:2]) == pytest.approx(1.0)
    assert mean_norm([torch.tensor([torch.nan, 0.0]), *values[1:3]]) == pytest.approx(1.5)


def bundled_editor(pilots):
    module = RROME(
        language_model=load_language_model("pkg://prune_lightning.bundled/model"),
        layers=[0],
        second_moments=SecondMoments(None, shipped="pkg://prune_lightning.bundled/statistics"),
        value=ValueOptions(steps=3, anchor="mean", pilots=pilots),
        contexts=ContextOptions(fixed=["The river. "]),
    )
    module.second_moments.compute = lambda model, layers, clock=None, tokens_per_feature=None: {0: _Identity()}
    return module


def test_the_anchor_is_measured_on_the_streams_first_requests_before_the_first_edit():
    module = bundled_editor(pilots=3)
    world = BundledWorld(num_edits=4)
    quiet_trainer(limit_train_batches=1).fit(module, datamodule=world)
    module.run.restore()
    module.prefixes, module.value = ("",), ValueOptions(steps=3)
    values = module.optimise(world.requests[:3], ShiftSite(0, "mlp"))
    expected = float(values.target.double().norm(dim=1).mean())
    assert module.facts["anchor_norm/0"] == pytest.approx(expected, rel=1e-5)


def test_a_stream_that_is_extended_keeps_its_anchor(tmp_path):
    """A stream of two has two pilots; one that was planned longer has another anchor."""
    short, long = bundled_editor(pilots=4), bundled_editor(pilots=4)
    quiet_trainer(EditLedger(tmp_path)).fit(short, datamodule=BundledWorld(num_edits=2))
    ledger = Ledger.open(tmp_path)
    assert ledger.base["constants"] == {"anchor_norm/0": short.facts["anchor_norm/0"]}
    world = BundledWorld(num_edits=4, done=ledger.sizes)
    quiet_trainer(EditLedger(tmp_path, ledger=ledger), limit_train_batches=1).fit(long, datamodule=world)
    assert long.facts == short.facts
    planned = bundled_editor(pilots=4)
    quiet_trainer(limit_train_batches=1).fit(planned, datamodule=BundledWorld(num_edits=4))
    assert planned.facts["anchor_norm/0"] != pytest.approx(short.facts["anchor_norm/0"], rel=1e-3)


def test_a_checkpoint_keeps_the_anchor():
    first, second = bundled_editor(pilots=2), bundled_editor(pilots=2)
    first.load_constants({"anchor_norm/0": 3.5})
    first._trainer = None
    checkpoint = {}
    first.prepare()
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    second.prepare()
    assert second.facts == {"anchor_norm/0": 3.5}


@pytest.mark.parametrize("method", ["r_rome", "memit"])
def test_without_an_anchor_a_given_norm_shows_in_the_metrics_and_changes_nothing(method):
    plain, watched = module_of(method), module_of(method, anchor_norm=2.0)
    site = plain.value_sites()[0]
    before = plain.optimise(BATCH, site)
    values = watched.optimise(BATCH, site)
    assert torch.equal(values.target, before.target)
    assert "norm_ratio" not in before.details[0]
    ratios = (asked(plain, before).norm(dim=1) / 2.0).tolist()
    assert [detail["norm_ratio"] for detail in values.details] == pytest.approx(ratios, rel=1e-6)
    assert "value/norm_ratio" not in plain.edit(BATCH).figures()
    figures = watched.edit(BATCH).figures()
    assert figures["value/norm_ratio"] == max(detail["norm_ratio"] for detail in watched.run.last_report.details)


def test_own_takes_no_norm():
    with pytest.raises(UserError, match="leave out anchor_norm"):
        RROME(
            language_model=build("memit", "gpt2").language_model,
            layers=[0],
            second_moments=SecondMoments(None),
            value=ValueOptions(anchor="own", anchor_norm=1.0),
        )


class _Identity:
    def solve(self, keys):
        return keys


def test_without_a_stream_the_anchor_has_to_be_given():
    module = build("memit", "gpt2")
    module.value = ValueOptions(steps=4, anchor="cap")
    with pytest.raises(UserError, match="anchor_norm"):
        module.prepare()


def test_guard_finds_the_largest_ratio():
    guard = AnchorGuard(most=2.0)
    assert guard.look({}, [{}, {"norm_ratio": 2.0}]) is None
    finding = guard.look({}, [{"norm_ratio": 1.0}, {"norm_ratio": 3.0}])
    assert finding is not None
    assert finding.figures == {"norm_ratio": 3.0}


@pytest.mark.parametrize("hits", [1, 3])
def test_a_value_is_done_after_so_many_steps_on_top(hits, bundled_shared):
    """The steps on top are counted from the logits of values that were optimised for 1, 2, ... steps."""
    model, site, world = bundled_shared, ShiftSite(1, "block"), BundledWorld(num_edits=2)
    world.setup()
    rows = rows_of(model, world.requests)
    layout = Layout(model, rows)
    problem = WholeForward(model, site, layout)
    most, on_top = 12, []
    for steps in range(1, most + 1):
        values = optimise_values(model, rows, site, ValueOptions(steps=steps, stop_loss=0.0))
        logits = problem.logits(layout, values.target - values.reference)[: len(layout.label)]
        right = logits.argmax(-1) == layout.label
        on_top.append([bool(right[layout.label_owner == i].all()) for i in range(2)])
    options = ValueOptions(steps=most, stop_loss=0.0, early_stop=hits)
    stopped = optimise_values(model, rows, site, options)
    for i, detail in enumerate(stopped.details):
        counts = [sum(each[i] for each in on_top[: step + 1]) for step in range(most)]
        assert counts[-1] >= hits, "the stream of steps reaches the stop"
        assert detail["steps"] == counts.index(hits)


def test_edits_with_an_anchor_run_in_a_stream():
    module = build("memit", "gpt2")
    module.value = ValueOptions(steps=4, anchor="own")
    quiet_trainer().fit(module, DataLoader(batches(), batch_size=None))
    assert module.run.last_report.details[0]["norm_ratio"] > 0
