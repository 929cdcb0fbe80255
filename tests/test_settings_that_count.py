"""No setting is silently ignored: where a wrapper, a restraint or a method has no use for one, it says so."""

from __future__ import annotations

from functools import partial

import pytest
import reference_editors as reference
import torch
from test_reference_editors import Texts, batches
from test_restraint import RandomEdits, edits, fit
from test_restraint_conformance import Steps
from test_spectral import dense_prune

from prune_lightning.callbacks import PRUNE, RECT, EditLedger, LowCurvature, SpectralRestraint, SubspaceFilter
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger
from prune_lightning.methods.alphaedit import AlphaEdit
from prune_lightning.methods.fine_tuning import FineTuning
from prune_lightning.methods.knowledge_neurons import SelectionOptions
from prune_lightning.methods.lora import LoRA
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.mend import MEND
from prune_lightning.methods.mend_network import NetworkShape
from prune_lightning.methods.r_rome import RROME
from prune_lightning.methods.simie import SimIE
from prune_lightning.methods.ultraedit import UltraEdit
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.curvature import CorpusCurvature
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.spectral import HardClip, sigma_max
from prune_lightning.types import EditBatch

MOMENTS = SecondMoments(Texts(), ridge=0.1)


@pytest.fixture
def model():
    return LanguageModel(*reference.tiny_model("gpt2"))


IN_SIMIE = {
    "accumulate_past_keys=true": (MEMIT, {"second_moments": MOMENTS, "ridge": 1.0, "accumulate_past_keys": True}),
    "refresh_every": (AlphaEdit, {"second_moments": MOMENTS, "preserve": 1.0, "refresh_every": 10}),
    "keep=true": (LoRA, {"keep": True}),
    "restart_norm_stats=true": (MEND, {"hypernetwork": None, "network": NetworkShape(4), "restart_norm_stats": True}),
    "anchor=original": (FineTuning, {"loss": "target", "epsilon": 0.1, "anchor": "original"}),
    "UltraEdit": (UltraEdit, {}),
    "SimIE": (SimIE, {"editor": partial(FineTuning, layers=[1], loss="target")}),
    "set non_finite in place": (FineTuning, {"loss": "target", "non_finite": "raise"}),
}


@pytest.mark.parametrize("setting", IN_SIMIE)
def test_simie_refuses_what_its_editor_would_not_do(setting, model):
    kind, options = IN_SIMIE[setting]
    layers = {} if kind is SimIE else {"layers": [1]}
    with pytest.raises(UserError, match=setting):
        SimIE(model, partial(kind, **layers, **options))


def test_simie_takes_the_same_editors_without_these_settings(model):
    for kind, options in (
        (MEMIT, {"second_moments": MOMENTS, "ridge": 1.0}),
        (AlphaEdit, {"second_moments": MOMENTS, "preserve": 1.0}),
        (LoRA, {}),
        (MEND, {"hypernetwork": None, "network": NetworkShape(4)}),
        (FineTuning, {"loss": "target", "epsilon": 0.1}),
    ):
        assert SimIE(model, partial(kind, layers=[1], **options)).layers == (1,)
        other = SimIE(model, partial(kind, layers=[1], **options), layers=[0])
        assert all(".0." in name for name in other.edited_modules())


def test_simie_checks_what_its_editor_needs(model, tmp_path):
    class Missing(FineTuning):
        def check(self):
            raise UserError("a file is missing")

    with pytest.raises(UserError, match="a file is missing"):
        SimIE(model, partial(Missing, layers=[1], loss="target")).check()


REFUSED = {
    "every_n under each": (lambda model: PRUNE(every_n=5), "restraint.every_n=5 needs restraint.schedule=every_n"),
    "every_n at the end": (lambda model: SubspaceFilter(schedule="end", every_n=2), "but that is end"),
    "parameters": (lambda model: RECT(parameters="*.c_fc.*").attach(RandomEdits(model, [1])), "no edited matrix"),
    "KN's share": (lambda model: SelectionOptions(share=0.5), "refine=true"),
    "KN's number": (lambda model: SelectionOptions(wanted=(2, 5)), "refine=true"),
    "whitened": (lambda model: UltraEdit(model, [1], whiten=True, inflated_variance=True), "StableEdit"),
    "pilots": (
        lambda model: RROME(
            language_model=model, layers=[1], second_moments=MOMENTS, value=ValueOptions(pilots=5, anchor="own")
        ),
        r"method\.value\.anchor=mean or cap",
    ),
    "a restraint after one that withholds": (
        lambda model: fit(
            RandomEdits(model, [1]), edits(1), PRUNE(), LowCurvature(CorpusCurvature(MOMENTS, max_texts=4))
        ),
        "list LowCurvature before PRUNE",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_without_effect_is_refused(case, model):
    build, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        build(model)


def test_parameters_choose_among_edited_matrices(model):
    """Two restraints of two matrices, a third one free."""
    module = Steps(model, [0, 1])
    first, second = (matrix.original().clone() for matrix in module.edited_matrices().values())
    clip = SpectralRestraint(HardClip(), parameters="*.1.mlp.*")
    callback = PRUNE(20.0, parameters=["transformer.h.0.*"])
    fit(module, edits(3), callback, clip)
    assert min(each.metrics["restraint/num_changed"] for each in (callback, clip)) > 0
    assert [list(each.matrices) for each in (callback, clip)] == [[name] for name in module.edited_matrices()]
    sums = []
    for layer in module.layers:
        total = 0
        for step in range(3):
            module.run.move_to(step, step)
            total = total + module.compute_update([None])[0][model.rewrite_name(layer)].dense()
        sums.append(total)
    left, sigma, right = torch.linalg.svd(sums[1])
    expected = [
        dense_prune(sums[0], 20.0, sigma_max(first)),
        left * sigma.clamp_max(sigma_max(second)) @ right,
    ]
    for matrix, original, change in zip(module.edited_matrices().values(), (first, second), expected, strict=True):
        # fp64, three edits: rounding leaves less, another restraint much more.
        assert float((matrix.weight() - original - change).norm() / change.norm()) < 1e-10


def test_the_steps_of_an_inner_optimizer_are_filtered_for_the_chosen_matrices_alone():
    changes = {}
    for parameters in (None, "*.1.*"):
        model = LanguageModel(*reference.tiny_model("gpt2"))
        module = FineTuning(language_model=model, layers=[0, 1], loss="target", steps=1, learning_rate=0.01)
        curvature = LowCurvature(CorpusCurvature(MOMENTS, max_texts=4), parameters=parameters)
        fit(module, [EditBatch(batches()[0].requests[:1])], curvature)
        changes[parameters] = [matrix.change.master for matrix in module.edited_matrices().values()]
    (free, filtered), both = changes["*.1.*"], changes[None]
    # Adam's first step moves every entry by its learning rate.
    assert torch.allclose(free.abs(), torch.full_like(free, 0.01), rtol=1e-3)
    assert torch.equal(filtered, both[1])
    assert not torch.allclose(free, both[0], rtol=0.1)


def test_a_resumed_run_recomputes_what_the_restraint_of_each_matrix_withholds(model, tmp_path, monkeypatch):
    """If no correction is stored, as where they are of high rank, and there is no snapshot."""
    monkeypatch.setattr("prune_lightning.ledger.events._KEPT_RANK", 0)

    def restraints():
        clip = SpectralRestraint(HardClip(), parameters="*.0.mlp.*")
        return clip, PRUNE(20.0, parameters="*.1.mlp.*")

    straight, module, resumed = (Steps(LanguageModel(*reference.tiny_model("gpt2")), [0, 1]) for _ in range(3))
    fit(straight, edits(4), *restraints())
    fit(module, edits(3), *restraints(), EditLedger(tmp_path))
    for path in tmp_path.glob("snapshot_*"):
        path.unlink()
    fit(resumed, edits(4)[3:], *restraints(), EditLedger(tmp_path, ledger=Ledger.open(tmp_path)))
    for ours, theirs in zip(resumed.edited_matrices().values(), straight.edited_matrices().values(), strict=True):
        assert ours.withheld is not None
        assert float((ours.weight() - theirs.weight()).norm() / theirs.delta().norm()) < 1e-12


def test_low_curvature_is_that_of_the_original_also_if_there_are_edits_already(model):
    module, first, second = RandomEdits(model, [1]), *(LowCurvature(CorpusCurvature(MOMENTS, 4)) for _ in range(2))
    first.attach(module)
    fit(module, edits(2))
    edited = module.language_model.rewrite_module(1).weight.detach().clone()
    second.attach(module)
    assert torch.equal(module.language_model.rewrite_module(1).weight, edited)
    (before,), (after,) = (list(each._spaces.values()) for each in (first, second))
    assert all(torch.equal(before.state_dict()[part], after.state_dict()[part]) for part in ("left", "right", "mask"))
