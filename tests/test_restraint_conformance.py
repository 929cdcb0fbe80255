"""Every restraint in `configs/restraint`, every schedule, against full fp64 decompositions, after every single step.

A restraint is a rule: what becomes of the sum of all steps, or of one step. Here it is written out for dense matrices,
by the name of its YAML; a YAML without such a rule fails.
"""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from conftest import ROOT, dense_space, quiet_trainer
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch, EditRequest, LowRankUpdate

# Feedback needs a method that computes its updates from what the weights lack: see test_feedback.
NAMES = sorted(path.stem for path in (ROOT / "configs" / "restraint").glob("*.yaml") if "feedback" not in path.stem)
STEPS, LAYERS = 8, (0, 1)

LAWS = {
    "prune": lambda s, top: math.log(s) / math.log(1.2) - math.log(top) / math.log(1.2) + top,
    "prune_linear": lambda s, top: s / 2 + top / 2,
    "prune_scale_free": lambda s, top: top * (1 + math.log2(s / top)),
    "clip": lambda s, top: top,
}
LAWS |= {"prune_end": LAWS["prune"], "prune_restrained": LAWS["prune"]}
GUARDED = {"prune", "prune_end", "prune_restrained", "prune_scale_free"}


class Steps(EditingModule):
    """Random updates of two requests each, small ones and large ones in turn."""

    def compute_update(self, requests):
        updates = {}
        for layer in self.layers:
            generator = torch.Generator().manual_seed(100 * layer + self.run.num_steps)
            sides = [torch.randn(32, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
            # Norms from half to six times that of the original: below the reference, just above it, and far beyond.
            scale = (0.05, 0.1, 0.4, 0.05)[self.run.num_steps % 4]
            update = LowRankUpdate(scale * sides[0], sides[1])
            updates[self.language_model.rewrite_name(layer)] = update.to(self.language_model.device)
        return updates, [{} for _ in requests]


class Watch(L.Callback):
    """Keeps the weights after every step and at the end, as they are and as an evaluation sees them."""

    def __init__(self):
        self.weights, self.views, self.final = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(self._look(pl_module))
        with pl_module.run.evaluation_view():
            self.views.append(self._look(pl_module))

    @staticmethod
    def _look(module):
        return [matrix.weight().clone() for matrix in module.edited_matrices().values()]


def restraint(name: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "train",
            [
                f"restraint={name}",
                "model.second_moments.corpus.samples=40",
                "model.second_moments.shipped=null",
                *(f"restraint.{override}" for override in overrides),
            ],
        )
    return instantiate(config.restraint, _convert_="all") if config.restraint else None


def low_curvature(tiny):
    """Return, by layer, the projection that the configured statistics give, as one dense matrix."""
    model = tiny("gpt2")
    names = [model.rewrite_name(layer) for layer in LAYERS]
    found = restraint("low_curvature").statistics.factors(model, names)
    return {layer: dense_space(*found[name], 0.99) for layer, name in zip(LAYERS, names, strict=True)}


def run(tiny, callback, trainer=quiet_trainer):
    """Return the original matrices, and the weights and views after every step."""
    module, watch = Steps(tiny("gpt2"), LAYERS), Watch()
    originals = [matrix.original().clone() for matrix in module.edited_matrices().values()]
    batches = [EditBatch(tuple(EditRequest(2 * i + j, "Ann", "Ann is", "old") for j in (0, 1))) for i in range(STEPS)]
    trainer(*([callback] if callback else []), watch).fit(module, DataLoader(batches, batch_size=None))
    watch.final = watch._look(module)
    assert len(watch.weights) == STEPS
    return originals, watch


def update(layer: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * layer + step)
    left, right = (torch.randn(32, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return (0.05, 0.1, 0.4, 0.05)[step % 4] * left @ right.T


def law_applied(change, original, law, guard):
    """Full SVD, every value mapped by itself."""
    top = float(torch.linalg.svdvals(original)[0])
    left, sigma, right = torch.linalg.svd(change)
    mapped = [s if s <= top else min(law(s, top), s) if guard else law(s, top) for s in sigma.tolist()]
    return left @ torch.diag(torch.tensor(mapped, dtype=torch.float64)) @ right


def mask(step, before, keep):
    """Keep the entries with the largest relative change, the first ones among equals."""
    ratio = (step / before).abs().flatten().tolist()
    kept = sorted(range(len(ratio)), key=lambda i: (-ratio[i], i))[: len(ratio) - math.floor((1 - keep) * len(ratio))]
    result = torch.zeros(len(ratio), dtype=torch.bool)
    result[kept] = True
    return result.view_as(step)


def filtered(name, change, original):
    """Full SVD of the original, its leading directions taken out of the change on one side or both."""
    rows, strength = (
        (original, 1.0) if name == "revive" else (original / (original.norm(dim=1, keepdim=True) + 1e-8), 0.8)
    )
    left, sigma, right = torch.linalg.svd(rows)
    count, held = 0, 0.0
    while held < 0.5 * float(sigma.square().sum()):
        held, count = held + float(sigma[count]) ** 2, count + 1
    assert 1 < count < len(sigma) / 2
    one = torch.eye(len(original), dtype=torch.float64)
    outputs = one - left[:, :count] @ left[:, :count].T if name == "revive" else one
    return outputs @ change @ (one - strength * right[:count].T @ right[:count])


def spectral(original, layer, law, guard, due, accumulate):
    """Return the weights after every step if the law is applied after the steps that are ``due``, and those of the end.

    At the end the law is applied to what is left.
    """
    weights, carried, withheld = [], torch.zeros_like(original), torch.zeros_like(original)
    for step in range(STEPS + 1):
        if step < STEPS:
            carried = carried + update(layer, step)
        if step == STEPS or due(step + 1):
            excess = carried - law_applied(carried, original, law, guard)
            if accumulate == "raw":
                withheld = excess
            elif step < STEPS or not due(STEPS):
                carried = carried - excess
        weights.append(original + carried - withheld)
    return weights[:-1], weights[-1]


def close(ours, theirs, original):
    """Equal but for fp64's rounding, in units of what has changed."""
    return float((ours - theirs).norm()) < 1e-11 * float((theirs - original).norm())


SCHEDULES = {"each": lambda step: True, "every_n": lambda step: step in (3, 6), "end": lambda step: False}


def by_rule(name, original, layer, space=None):
    """Return the weights after every step under a configured restraint, the views of them, and those of the end."""
    if name in LAWS:
        due = SCHEDULES["end" if name == "prune_end" else "each"]
        accumulate = "restrained" if name == "prune_restrained" else "raw"
        guard = name in GUARDED
        expected, final = spectral(original, layer, LAWS[name], guard, due, accumulate)
        # What is evaluated is restrained, also where the edits continue unrestrained.
        views, _ = spectral(original, layer, LAWS[name], guard, SCHEDULES["each"], accumulate)
        return expected, views, final
    expected, change = [], torch.zeros_like(original)
    for number in range(STEPS):
        step = update(layer, number)
        if name == "rect":
            step = step * mask(step, original + change, keep=0.2)
        elif name == "low_curvature":
            step = space(step)
        elif name != "none":
            step = filtered(name, step, original)
        change = change + step
        expected.append(original + change)
    return expected, expected, expected[-1]


@pytest.mark.parametrize("name", NAMES)
def test_as_configured(name, tiny):
    originals, watch = run(tiny, restraint(name))
    spaces = low_curvature(tiny) if name == "low_curvature" else {}
    for place, (layer, original) in enumerate(zip(LAYERS, originals, strict=True)):
        expected, views, final = by_rule(name, original, layer, spaces.get(layer))
        for step in range(STEPS):
            assert close(watch.weights[step][place], expected[step], original), (layer, step)
            assert close(watch.views[step][place], views[step], original), (layer, step)
        assert close(watch.final[place], final, original)


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prune_under_every_schedule(schedule, guard, accumulate, tiny):
    every_n = 3 if schedule == "every_n" else 1
    settings = f"schedule={schedule}", f"every_n={every_n}", f"guard={guard}", f"accumulate={accumulate}"
    callback = restraint("prune", *settings)
    originals, watch = run(tiny, callback)
    for place, (layer, original) in enumerate(zip(LAYERS, originals, strict=True)):
        expected, final = spectral(original, layer, LAWS["prune"], guard, SCHEDULES[schedule], accumulate)
        for step in range(STEPS):
            assert close(watch.weights[step][place], expected[step], original), (layer, step)
        assert close(watch.final[place], final, original)


@pytest.mark.parametrize("guard", [True, False])
def test_the_scale_free_law_with_and_without_its_guard(guard, tiny):
    originals, watch = run(tiny, restraint("prune_scale_free", f"law.guard={guard}", "schedule=every_n", "every_n=3"))
    for place, (layer, original) in enumerate(zip(LAYERS, originals, strict=True)):
        expected, final = spectral(original, layer, LAWS["prune_scale_free"], guard, SCHEDULES["every_n"], "raw")
        assert all(close(w[place], e, original) for w, e in zip(watch.weights, expected, strict=True))
        assert close(watch.final[place], final, original)


def test_the_steps_are_such_that_no_choice_is_without_effect(tiny):
    """Guard, schedule and way to accumulate all show in the weights of every layer."""
    originals, _ = run(tiny, None)
    for layer, original in zip(LAYERS, originals, strict=True):

        def final(schedule, guard, accumulate, original=original, layer=layer):
            return spectral(original, layer, LAWS["prune"], guard, SCHEDULES[schedule], accumulate)[-1]

        assert not close(final("each", True, "raw"), final("each", False, "raw"), original)
        assert not close(final("each", True, "restrained"), final("every_n", True, "restrained"), original)
        assert not close(final("each", True, "raw"), final("each", True, "restrained"), original)
