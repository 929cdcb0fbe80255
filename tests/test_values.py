"""The value optimiser against the plain statement of it, on every family."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from plain_values import plain_value
from test_scoring import break_token

from prune_lightning.methods.prompts import kl_row, target_row
from prune_lightning.methods.value import ValueOptions, optimise_values
from prune_lightning.methods.value_problem import Layout, RequestRows, ShiftSite, UpperForward, WholeForward
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditRequest

# Subjects at the start, in the middle and near the end; prompts and targets of all lengths.
REQUESTS = [
    EditRequest(0, "Lisbon", "Lisbon is the capital of", "Spain"),
    EditRequest(1, "the old Danube", "For as long as anybody here remembers, the old Danube", "flows into a lake"),
    EditRequest(2, "Ada", "It was written that Ada was born in", "a very small town by the sea"),
    EditRequest(3, "Bo", "Bo is", "no"),
    EditRequest(4, "Mount Elbert", "Hikers say that Mount Elbert lies in the country of", "Peru"),
]
PREFIXES = ("", "The. ", "Because it rained all day. ")
ALL_STEPS = ValueOptions(steps=6, stop_loss=0.0)


def rows_of(model, requests=REQUESTS):
    return [RequestRows(tuple(target_row(model, r, prefix) for prefix in PREFIXES), kl_row(model, r)) for r in requests]


def exactness(family: str) -> float:
    """Return the rounding that a family allows, whatever the processor.

    ``transformers`` computes the attention of gptj and the RMS norms in fp32 whatever the model's dtype: ten roundings
    of that. gemma2 has four such norms in each block, one after another.
    """
    fp32 = 10 * torch.finfo(torch.float32).eps
    return {"gpt2": 1e-8, "gpt_neox": 1e-8, "gemma2": 10 * fp32}.get(family, fp32)


@pytest.mark.parametrize("case", ["all steps", "early stops", "clamped"])
@pytest.mark.parametrize("at", ["mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_on_the_fast_path_equals_one_by_one_on_the_plain_one(family, at, case, tiny, recwarn):
    model, site, options = tiny(family), ShiftSite(1, at), ALL_STEPS
    rows, tolerance = rows_of(model), exactness(family)
    plain = [plain_value(model, request, site, options) for request in rows]
    if case == "early stops":  # two of the five stop on the way, at different steps
        ends = sorted(min(losses) for _, _, losses, _ in plain)
        options = ValueOptions(steps=6, stop_loss=(ends[1] + ends[2]) / 2)
    if case == "clamped":  # half of the largest shift without a clamp
        options = ValueOptions(
            steps=6, stop_loss=0.0, clamp=max(float((z - r).norm() / r.norm()) for z, r, *_ in plain) / 2
        )
    plain = [plain_value(model, request, site, options) for request in rows]
    values = optimise_values(model, rows, site, options)
    assert not [w for w in recwarn if "fast path" in str(w.message)]
    for i, (target, reference, losses, clamped) in enumerate(plain):
        assert float((values.target[i] - target).norm()) < tolerance * float(target.norm())
        assert torch.allclose(values.reference[i], reference, rtol=tolerance, atol=tolerance)
        assert values.details[i]["losses"] == pytest.approx(losses, rel=tolerance)
        assert (values.details[i]["steps"], values.details[i]["clamped"]) == (len(losses) - 1, clamped)
    assert (len({len(losses) for _, _, losses, _ in plain}) > 1) == (case == "early stops")
    assert any(clamped for *_, clamped in plain) or case != "clamped"


@pytest.mark.parametrize("family", FAMILIES)
def test_in_single_precision(family, tiny):
    model = tiny(family, torch.float32)
    values = optimise_values(model, rows_of(model), ShiftSite(1, "block"), ALL_STEPS)
    for i, request in enumerate(rows_of(model)):
        target, *_ = plain_value(model, request, ShiftSite(1, "block"), ALL_STEPS)
        assert float((values.target[i] - target).norm()) < 1e-3 * float(target.norm())


@pytest.mark.parametrize("at", ["mlp", "block"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_both_paths_give_equal_logits_for_any_shift_at_any_layer(layer, at, tiny):
    """Below the first block there is nothing to pass through, above the last nothing to run."""
    model, site = tiny("llama"), ShiftSite(layer, at)
    layout = Layout(model, rows_of(model))
    shift = torch.randn(len(REQUESTS), 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, upper = WholeForward(model, site, layout), UpperForward(model, site, layout)
    expected = whole.logits(layout, shift)
    assert torch.allclose(upper.logits(layout, shift), expected, rtol=1e-6, atol=1e-6)  # llama's norms are fp32
    assert not torch.allclose(expected, whole.base_logits, rtol=1e-2)
    keep = [1, 4]
    rows = torch.nonzero(torch.isin(layout.owner, torch.tensor(keep)))[:, 0]
    part = Layout(model, [rows_of(model)[i] for i in keep])
    upper.select(rows)
    assert torch.allclose(upper.logits(part, shift[keep]), whole.logits(part, shift[keep]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_the_shift_in_single_precision(dtype, tiny):
    model, site, options = tiny("llama", dtype), ShiftSite(1, "block"), ALL_STEPS
    values = optimise_values(model, rows_of(model), site, options)
    assert values.target.dtype == torch.float32
    first = [detail["losses"][0] for detail in values.details]
    assert all(detail["losses"][-1] < before for detail, before in zip(values.details, first, strict=True))
    for i, request in enumerate(rows_of(model)):
        assert first[i] == pytest.approx(plain_value(model, request, site, options)[2][0], rel=0.05)


def test_both_sites_give_equal_logits_where_the_mlp_is_simply_added(tiny):
    model = tiny("gptj")
    layout = Layout(model, rows_of(model))
    shift = torch.randn(len(REQUESTS), 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mlp, block = (WholeForward(model, ShiftSite(1, at), layout).logits(layout, shift) for at in ("mlp", "block"))
    assert torch.allclose(mlp, block, rtol=1e-10, atol=1e-10)


def test_a_model_that_the_fast_path_does_not_fit_takes_the_plain_one_and_says_so(tiny, monkeypatch):
    model, site, options = tiny("gpt2"), ShiftSite(1, "block"), ALL_STEPS
    logits = UpperForward.logits
    monkeypatch.setattr(UpperForward, "logits", lambda self, layout, shift: 1.01 * logits(self, layout, shift))
    with pytest.warns(UserWarning, match="the whole model runs at every step"):
        values = optimise_values(model, rows_of(model), site, options)
    for i, request in enumerate(rows_of(model)):
        assert torch.allclose(values.target[i], plain_value(model, request, site, options)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_micro_batches_do_not_change_the_result(budget, tiny):
    model, site = tiny("gpt2"), ShiftSite(1, "mlp")
    whole = optimise_values(model, rows_of(model), site, ValueOptions(steps=4))
    parts = optimise_values(model, rows_of(model), site, ValueOptions(steps=4, token_budget=budget))
    assert torch.allclose(whole.target, parts.target, rtol=1e-10)
    assert len(parts.details) == len(REQUESTS)


def test_out_of_memory_halves_the_batch(tiny, monkeypatch):
    model, site, sizes = tiny("gpt2"), ShiftSite(1, "mlp"), []
    whole = optimise_values(model, rows_of(model), site, ValueOptions(steps=4))
    build = UpperForward.__init__

    def limited(self, model, site, layout):
        sizes.append(layout.ids.numel())
        if layout.ids.numel() > 200:
            raise torch.OutOfMemoryError("no")
        build(self, model, site, layout)

    monkeypatch.setattr(UpperForward, "__init__", limited)
    values = optimise_values(model, rows_of(model), site, ValueOptions(steps=4))
    assert torch.allclose(values.target, whole.target, rtol=1e-10)
    assert sizes[0] > 200


def test_a_nonfinite_loss_ends_the_request_and_is_reported(tiny):
    model = tiny("gpt2")
    with torch.no_grad():
        model.rewrite_module(2).weight[0, 0] = float("nan")
    values = optimise_values(model, rows_of(model)[:2], ShiftSite(1, "mlp"), ValueOptions(steps=4))
    assert all(detail["losses"][0] != detail["losses"][0] for detail in values.details)
    assert values.target.isnan().all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_request_that_breaks_from_the_start_leaves_the_others_alone(family, tiny):
    model, site, options = tiny(family), ShiftSite(1, "block"), ValueOptions(steps=4, stop_loss=0.0)
    rows = rows_of(model)
    whole = optimise_values(model, rows, site, options)
    of_others = {token for i, request in enumerate(rows) if i != 2 for row in request.all for token in row.ids}
    break_token(model, next(token for token in rows[2].targets[0].ids if token not in of_others))
    values = optimise_values(model, rows, site, options)
    others = torch.arange(len(rows)) != 2
    assert values.target[2].isnan().all()
    assert torch.allclose(values.target[others], whole.target[others], rtol=1e-6)


def test_a_request_that_breaks_on_the_way_has_no_value_and_the_others_keep_theirs(tiny, monkeypatch):
    """A finite value whose likelihood is not finite must not be written."""
    model, site, options = tiny("gpt2"), ShiftSite(1, "mlp"), ValueOptions(steps=4)
    rows = rows_of(model)[:3]
    expected = optimise_values(model, rows, site, options).target
    plain = UpperForward.logits

    def breaking(self, layout, shift):
        logits = plain(self, layout, shift)
        return torch.where((layout.owner[layout.read_rows] == 2)[:, None] & (shift != 0).any(), torch.nan, logits)

    monkeypatch.setattr(UpperForward, "logits", breaking)
    values = optimise_values(model, rows, site, options)
    assert values.details[2]["steps"] == 1, "the second loss is NaN"
    assert values.target[2].isnan().all()
    assert torch.allclose(values.target[:2], expected[:2], rtol=1e-10)


def test_nothing_is_left_on_the_model():
    model = load_language_model("pkg://prune_lightning.bundled/model")
    before = {name: dict(module.__dict__) for name, module in model.model.named_modules()}
    optimise_values(model, rows_of(model), ShiftSite(1, "block"), ValueOptions(steps=2))
    assert {name: dict(module.__dict__) for name, module in model.model.named_modules()} == before
