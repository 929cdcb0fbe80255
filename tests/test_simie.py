"""SimIE against the public implementation, and its recursion against the one-time problem."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import reference_editors as reference
import torch
from conftest import SHARED, quiet_trainer, write
from safetensors.torch import load_file
from test_oracles import build as build_oracle
from test_reference_editors import Texts, batches, build
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE, EditLedger
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger
from prune_lightning.methods.fine_tuning import FineTuning
from prune_lightning.methods.knowledge_neurons import KnowledgeNeurons
from prune_lightning.methods.least_squares import regression_update
from prune_lightning.methods.lora import LoRA
from prune_lightning.methods.mend import MEND
from prune_lightning.methods.mend_network import NetworkShape
from prune_lightning.methods.patched_neurons import AttributionOptions
from prune_lightning.methods.r_rome import RROME
from prune_lightning.methods.simie import SimIE
from prune_lightning.methods.value import ValueOptions
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.types import EditBatch, EditRequest, LowRankUpdate

ORACLES = SHARED / "oracles"


class NowAndThen(FineTuning):
    """Leaves every second edit's matrix as it is, as knowledge neurons does with a layer where it selects no neuron."""

    def compute_update(self, requests):
        updates, details = super().compute_update(requests)
        return ({} if int(requests[0].case_id) % 2 else updates), details


EDITORS = {
    "r_rome": partial(
        RROME,
        layers=[1],
        second_moments=SecondMoments(Texts(), ridge=0.1),
        value=ValueOptions(steps=4),
        contexts=ContextOptions(fixed=reference.PREFIXES[1:]),
    ),
    "ft_m": partial(FineTuning, layers=[1], loss="target", steps=3, learning_rate=0.05),
    "lora": partial(LoRA, layers=[1], rank=4, steps=3, learning_rate=0.05),
    "kn": partial(KnowledgeNeurons, layers=[1], attribution=AttributionOptions(steps=4)),
    "mend": partial(
        MEND, layers=[1], hypernetwork=None, weights=["c_proj"], network=NetworkShape(4, initial_rate=-10.0)
    ),
    "now and then": partial(NowAndThen, layers=[1], loss="target", steps=3, learning_rate=0.05),
}


class FromCurrent(SimIE):
    """The public code with ``init_model=false``: single edits of the running weights, added to them."""

    def compute_update(self, requests):
        self._keys = self._read_keys(requests)
        single, details = self.editor.compute_update(requests)
        ((name, keys),) = self._keys.items()
        solved = self._inverse(name, keys).solve(keys)
        return {name: regression_update(single[name].times(keys), keys, solved, damping=1.0)}, details


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
@pytest.mark.parametrize(("variant", "kind"), [("from_original", SimIE), ("from_current", FromCurrent)])
def test_four_edits_match_the_public_code(variant, kind):
    facts, tensors = json.loads((ORACLES / "oracles.json").read_text()), load_file(ORACLES / "oracles.safetensors")
    theirs = load_file(ORACLES / "oracles_2026.safetensors")
    setting = json.loads((ORACLES / "oracles_2026.json").read_text())["methods"]["simie"]["hyper_parameters"]
    inner = build_oracle((facts, None, tensors), "r_rome", facts["rome_contexts"][1:])
    module = kind(inner.language_model, lambda language_model: inner, setting["simie"]["lamHyper"], relative=False)
    module.prepare()
    ((_, matrix),) = module.edited_matrices().items()
    for index in setting["simie"]["requests"]:
        record = facts["requests"][index]
        request = EditRequest(record["case_id"], record["subject"], record["prompt"], record["target_new"])
        updates, _ = module.compute_update([request])
        keys = next(iter(module._keys.values())).T
        assert torch.allclose(keys, theirs[f"simie.{variant}.{index}.keys"], rtol=0, atol=1e-9)
        write(module, [request], updates)
        if (expected := theirs.get(f"simie.{variant}.{index}.weight")) is not None:
            distance = (matrix.weight() - expected.T).norm() / (expected.T - matrix.original()).norm()
            assert float(distance) < 1e-6


def stream():
    """The reference's batches with an old answer, which knowledge neurons needs."""
    return [EditBatch(tuple(replace(r, target_old="red") for r in batch.requests)) for batch in batches()]


def whole(update):
    """An update as a matrix, multiplied in fp64 whatever its dtype."""
    if isinstance(update, LowRankUpdate):
        return update.left.double() @ update.right.double().T
    return update.dense().double()


def simie(editor, **options):
    torch.manual_seed(0)  # MEND's new network
    return SimIE(LanguageModel(*reference.tiny_model("gpt2")), EDITORS[editor], **options)


def dense(editor, relative):
    """The one-time solution from single edits, each computed on a model of its own."""
    single, bracket, change, unit = simie(editor), 0, 0, None
    single.prepare()
    for batch in stream():
        updates = single.editor.compute_update(batch.requests)[0]
        # LoRA seeds each edit by its position.
        single.editor.run.move_to(single.editor.num_requests + len(batch.requests), 0)
        ((name, keys),) = single._read_keys(batch.requests).items()
        unit = float((keys * keys).sum() / keys.numel()) if unit is None else unit
        bracket = bracket + keys @ keys.T
        if name in updates:
            change = change + whole(updates[name]) @ keys @ keys.T
    ridge = 0.3 * (unit if relative else 1.0)
    return change @ torch.linalg.inv(bracket + ridge * torch.eye(len(bracket), dtype=torch.float64))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("editor", EDITORS)
def test_a_stream_is_the_one_time_ridge_solution(editor, relative):
    module = simie(editor, ridge=0.3, relative=relative)
    quiet_trainer().fit(module, DataLoader(stream(), batch_size=None))
    ((_, matrix),) = module.edited_matrices().items()
    expected = dense(editor, relative)
    assert float((matrix.weight() - matrix.original() - expected).norm() / expected.norm()) < 1e-9
    assert float(expected.norm()) > 1e-3


def test_with_feedback_the_sum_is_the_one_time_solution_under_prune():
    module = simie("r_rome", ridge=0.3)
    quiet_trainer(PRUNE(1e6, feedback=True)).fit(module, DataLoader(batches(), batch_size=None))
    ((_, matrix),) = module.edited_matrices().items()
    assert matrix.withheld is not None
    expected = dense("r_rome", True)
    assert float((matrix.change.master - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("replayed", [False, True])
def test_a_resumed_stream_knows_the_keys_before(replayed, tmp_path):
    straight, module = simie("ft_m"), simie("ft_m")
    quiet_trainer().fit(straight, DataLoader(batches(), batch_size=None))
    quiet_trainer(EditLedger(tmp_path)).fit(module, DataLoader(batches()[:2], batch_size=None))
    for path in tmp_path.glob("snapshot_*") if replayed else ():
        path.unlink()
    module = simie("ft_m")
    ledger = EditLedger(tmp_path, ledger=Ledger.open(tmp_path))
    quiet_trainer(ledger).fit(module, DataLoader(batches()[2:], batch_size=None))
    for one, other in zip(module.edited_matrices().values(), straight.edited_matrices().values(), strict=True):
        assert torch.equal(one.weight(), other.weight())


def test_a_ridge_has_to_be_positive():
    inner = build("memit", "gpt2")
    with pytest.raises(UserError, match="positive"):
        SimIE(inner.language_model, lambda language_model: inner, ridge=0)
