"""The spectrum monitor: its figures against dense decompositions, its cadence, its picture."""

from __future__ import annotations

import pytest
import torch
from test_restraint import BASE, RandomEdits, Regression, Remember, edits, fit, regression_batches

from prune_lightning.callbacks import PRUNE, SpectrumMonitor
from prune_lightning.errors import UserError

KEYS = {
    "sigma_max",
    "sigma_min",
    "condition_number",
    "condition_number_clipped",
    "norm_ratio",
    "delta_norm_ratio",
    "delta_sigma_max",
    "delta_stable_rank",
    "delta_effective_rank",
    "delta_num_above",
}


def test_figures_of_an_editing_module(tiny):
    module, logger = RandomEdits(tiny("llama"), [1]), Remember()
    weight = module.language_model.rewrite_module(1).weight
    original = weight.detach().clone()
    fit(module, edits(5), PRUNE(BASE), SpectrumMonitor(every_n=2), logger=logger, log_every_n_steps=1000)
    readings = {step: row for step, row in logger.rows if any(key.startswith("spectrum/") for key in row)}
    assert sorted(readings) == [0, 2, 4, 5]
    prefix = f"spectrum/{module.language_model.rewrite_name(1)}/"
    assert {key.removeprefix(prefix) for key in readings[0]} == KEYS
    assert readings[0][prefix + "delta_sigma_max"] == 0.0
    last, delta = readings[5], weight.detach() - original
    values, change = torch.linalg.svdvals(weight.detach()), torch.linalg.svdvals(delta)
    assert last[prefix + "sigma_max"] == pytest.approx(float(values[0]))
    assert last[prefix + "condition_number"] == pytest.approx(float(values[0] / values[-1]))
    assert last[prefix + "delta_stable_rank"] == pytest.approx(float(change.square().sum() / change[0] ** 2))
    assert last[prefix + "delta_num_above"] == int((change > torch.linalg.svdvals(original)[0]).sum()) == 5
    assert last[prefix + "norm_ratio"] == pytest.approx(float(weight.detach().norm() / original.norm()))
    assert last[prefix + "delta_norm_ratio"] == pytest.approx(float(delta.norm() / original.norm()))
    ((key, images, step),) = logger.images
    assert (key, step) == ("plots/spectra", 5)
    assert images[0].size[0] > 300


def test_parameters_choose_among_edited_matrices_too(tiny):
    module, monitor = RandomEdits(tiny("llama"), [0, 1]), SpectrumMonitor(parameters="*.1.mlp.*", draw=False)
    fit(module, edits(1), monitor)
    assert list(monitor.matrices) == [module.language_model.rewrite_name(1)]


def test_shares_the_matrices_of_a_restraint_or_takes_its_own():
    for callbacks in ([PRUNE(BASE, parameters=["second.*"])], []):
        logger, monitor = Remember(), SpectrumMonitor(every_n=1)
        fit(Regression(), regression_batches(2), monitor, *callbacks, logger=logger)
        names = ["second.weight"] if callbacks else ["first.weight", "second.weight"]
        assert list(monitor.matrices) == names
        assert [step for step, row in logger.rows if "spectrum/second.weight/sigma_max" in row] == [0, 1, 2]
    with pytest.raises(UserError, match="every_n"):
        SpectrumMonitor(every_n=0)
