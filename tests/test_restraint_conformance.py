"""Every restraint in `configs/restraint`, every schedule, against full fp64 decompositions, after every single step.

A restraint is a rule: what becomes of the sum of all steps, or of one step. Here it is written out for dense matrices,
by the name of its YAML; a YAML without such a rule fails.
"""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from conftest import ROOT, quiet_trainer
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from prune_lightning.methods.base import EditingModule
from prune_lightning.types import EditBatch, EditRequest, LowRankUpdate

NAMES = sorted(path.stem for path in (ROOT / "configs" / "restraint").glob("*.yaml"))
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
            generator = torch.Generator().manual_seed(100 * layer + self.num_steps)
            sides = [torch.randn(32, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
            # Norms from half to six times that of the original: below the reference, just above it, and far beyond.
            scale = (0.05, 0.1, 0.4, 0.05)[self.num_steps % 4]
            updates[self.language_model.rewrite_name(layer)] = LowRankUpdate(scale * sides[0], sides[1])
        return updates, [{} for _ in requests]


class Watch(L.Callback):
    """Keeps the weights after every step, as they are and as an evaluation sees them."""

    def __init__(self):
        self.weights, self.views = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(self._look(pl_module))
        with pl_module.evaluation_view():
            self.views.append(self._look(pl_module))

    @staticmethod
    def _look(module):
        return [matrix.weight().clone() for matrix in module.edited_matrices().values()]


def restraint(name: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [f"restraint={name}", *(f"restraint.{override}" for override in overrides)])
    return instantiate(config.restraint, _convert_="all") if config.restraint else None


def run(tiny, callback):
    """Return the original matrices, and the weights and views after every step."""
    module, watch = Steps(tiny("gpt2"), LAYERS), Watch()
    originals = [matrix.original().clone() for matrix in module.edited_matrices().values()]
    batches = [EditBatch(tuple(EditRequest(2 * i + j, "Ann", "Ann is", "old") for j in (0, 1))) for i in range(STEPS)]
    quiet_trainer(*([callback] if callback else []), watch).fit(module, DataLoader(batches, batch_size=None))
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


def spectral(original, layer, law, guard, due, accumulate):
    """Return the weight after every step, if the law is applied after the steps that are ``due``."""
    weights, carried, withheld = [], torch.zeros_like(original), torch.zeros_like(original)
    for step in range(STEPS):
        carried = carried + update(layer, step)
        if due(step + 1):
            excess = carried - law_applied(carried, original, law, guard)
            if accumulate == "raw":
                withheld = excess
            else:
                carried = carried - excess
        weights.append(original + carried - withheld)
    return weights


def close(ours, theirs, original):
    """Equal but for fp64's rounding, in units of what has changed."""
    return float((ours - theirs).norm()) < 1e-11 * float((theirs - original).norm())


def each(step):
    return True


def every_three(step):
    return step in (3, 6, 8)  # the last step is always due


def at_the_end(step):
    return step == 8


SCHEDULES = {"each": each, "every_n": every_three, "end": at_the_end}


@pytest.mark.parametrize("name", NAMES)
def test_as_configured(name, tiny):
    originals, watch = run(tiny, restraint(name))
    for place, (layer, original) in enumerate(zip(LAYERS, originals, strict=True)):
        if name == "none":
            expected = [original + sum(update(layer, i) for i in range(step + 1)) for step in range(STEPS)]
        elif name == "rect":
            expected, weight = [], original
            for step in range(STEPS):
                change = update(layer, step)
                weight = weight + change * mask(change, weight, keep=0.2)
                expected.append(weight)
        else:
            due = at_the_end if name == "prune_end" else each
            accumulate = "restrained" if name == "prune_restrained" else "raw"
            expected = spectral(original, layer, LAWS[name], name in GUARDED, due, accumulate)
        for step in range(STEPS):
            assert close(watch.weights[step][place], expected[step], original), (name, layer, step)
        views = expected
        if name == "prune_end":  # what is evaluated is restrained
            views = spectral(original, layer, LAWS[name], True, each, "raw")
        assert all(close(view[place], other, original) for view, other in zip(watch.views, views, strict=True))


@pytest.mark.parametrize("accumulate", ["raw", "restrained"])
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prune_under_every_schedule(schedule, guard, accumulate, tiny):
    callback = restraint("prune", f"schedule={schedule}", "every_n=3", f"guard={guard}", f"accumulate={accumulate}")
    originals, watch = run(tiny, callback)
    for place, (layer, original) in enumerate(zip(LAYERS, originals, strict=True)):
        expected = spectral(original, layer, LAWS["prune"], guard, SCHEDULES[schedule], accumulate)
        for step in range(STEPS):
            assert close(watch.weights[step][place], expected[step], original), (layer, step)


@pytest.mark.parametrize("guard", [True, False])
def test_the_scale_free_law_with_and_without_its_guard(guard, tiny):
    originals, watch = run(tiny, restraint("prune_scale_free", f"law.guard={guard}", "schedule=every_n", "every_n=3"))
    for place, (layer, original) in enumerate(zip(LAYERS, originals, strict=True)):
        expected = spectral(original, layer, LAWS["prune_scale_free"], guard, every_three, "raw")
        assert all(close(w[place], e, original) for w, e in zip(watch.weights, expected, strict=True))


def test_the_steps_are_such_that_no_choice_is_without_effect(tiny):
    """Guard, schedule and way to accumulate all show in the weights of every layer."""
    originals, _ = run(tiny, None)
    for layer, original in zip(LAYERS, originals, strict=True):

        def final(schedule, guard, accumulate, original=original, layer=layer):
            return spectral(original, layer, LAWS["prune"], guard, SCHEDULES[schedule], accumulate)[-1]

        assert not close(final("each", True, "raw"), final("each", False, "raw"), original)
        assert not close(final("each", True, "restrained"), final("every_n", True, "restrained"), original)
        assert not close(final("each", True, "raw"), final("each", True, "restrained"), original)
