"""NSE against its dense statement, and against what its public code computed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import reference_editors as reference
import torch
from conftest import SHARED, quiet_trainer, write
from safetensors.torch import load_file
from test_oracles import GivenMoments, relative
from test_reference_editors import TOLERANCE, Texts, Watch, batches, distance
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE, EditLedger
from prune_lightning.errors import UserError
from prune_lightning.ledger import Ledger
from prune_lightning.methods.nse import NSE, largest_scores
from prune_lightning.methods.prompts import EditRow
from prune_lightning.methods.value import ValueOptions, optimise_values
from prune_lightning.methods.value_problem import ShiftSite
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.types import EditRequest

# Chosen so that in each family requests are left out because they are fitted and because they are too far away.
LIMITS = {"gpt2": (2.0, 9.0), "llama": (0.4, 6.5)}
SHARE, PASSES = 0.7, 3


class Reference(reference.ReferenceEditor):
    """The paper's algorithm, dense, one inverse of a submatrix at a time."""

    def __post_init__(self):
        super().__post_init__()
        self.original = {layer: self.weight(layer) for layer in self.settings.layers}
        self.active, self.selected = [], []

    def values(self, batch):
        """On the original weights."""
        last = self.settings.layers[-1]
        present = {layer: self.weight(layer) for layer in self.original}
        for layer in self.original:
            self.write(layer, self.original[layer] - present[layer])
        found = [self.value(fact, last, self.blocks[last]) for fact in batch]
        for layer in self.original:
            self.write(layer, present[layer] - self.weight(layer))
        return found

    def write_batch(self, batch):
        settings, last = self.settings, self.settings.layers[-1]
        low, high = LIMITS[self.family]
        targets = self.values(batch)
        for _ in range(PASSES):
            hidden = [self.at_subject(self.blocks[last], "output", fact, "") for fact in batch]
            norms = [float((z - h).norm()) for z, h in zip(targets, hidden, strict=True)]
            chosen = [i for i, norm in enumerate(norms) if low < norm < high]
            self.active.append((norms, chosen))
            if not chosen:
                return
            for position, layer in enumerate(settings.layers):
                keys = torch.stack([self.mixed_key(layer, batch[i]) for i in chosen], 1)
                present = torch.stack([self.at_subject(self.blocks[last], "output", batch[i], "") for i in chosen], 1)
                residual = torch.stack([targets[i] for i in chosen], 1) - present
                residual = residual / (len(settings.layers) - position)
                score = [sum(abs(float(k)) for k in row) for row in keys]
                order, held, picked = sorted(range(32), key=lambda i: -score[i]), 0.0, []
                for i in order:
                    held += score[i]
                    if held > SHARE * sum(score):
                        break
                    picked.append(i)
                self.selected.append(len(picked))
                part = keys[picked]
                bracket = settings.mom2_update_weight * self.moments[layer] + self.past[layer]
                bracket = bracket[picked][:, picked] + part @ part.T
                delta = torch.zeros(32, 32, dtype=torch.float64)
                delta[:, picked] = residual @ part.T @ torch.linalg.inv(bracket)
                self.write(layer, delta)


@cache
def by_hand(family):
    editor = Reference("memit_past", family)
    matrices = [[editor.weight(layer) for layer in editor.settings.layers]]
    for batch in reference.BATCHES:
        editor.edit(batch)
        matrices.append([editor.weight(layer) for layer in editor.settings.layers])
    return editor, matrices[0], matrices[1:]


def build(family, **options):
    settings = reference.Settings()
    low, high = LIMITS[family]
    given = {"smallest_residual": low, "largest_residual": high, "passes": PASSES, "neuron_share": SHARE} | options
    return NSE(
        language_model=LanguageModel(*reference.tiny_model(family)),
        layers=list(settings.layers),
        second_moments=SecondMoments(Texts(), ridge=settings.moment_ridge),
        value=ValueOptions(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            kl_factor=settings.kl_factor,
            clamp=settings.clamp,
        ),
        contexts=ContextOptions(fixed=reference.PREFIXES[1:]),
        ridge=settings.mom2_update_weight,
        **given,
    )


@pytest.mark.parametrize("family", reference.PATHS)
def test_every_batch_equals_the_dense_reference(family):
    editor, originals, expected = by_hand(family)
    module, watch = build(family), Watch()
    quiet_trainer(watch).fit(module, DataLoader(batches(), batch_size=None))
    for ours, theirs in zip(watch.weights, expected, strict=True):
        for one, other, original in zip(ours, theirs, originals, strict=True):
            assert distance(one, other, original) < TOLERANCE[family]
    assert any(detail["passes"] > 1 for detail in watch.details)
    low, high = LIMITS[family]
    norms = [norm for of_pass, _ in editor.active for norm in of_pass]
    assert min(norms) < low < high < max(norms), "requests are left out on both sides"
    assert all(0 < count < 32 for count in editor.selected)
    found = [detail["residuals"] for detail in watch.details]
    assert sorted(x for of in found for x in of) == pytest.approx(sorted(norms), rel=TOLERANCE[family])


def test_a_resumed_stream_remembers_the_keys_of_the_batches_before(tmp_path):
    _, originals, expected = by_hand("gpt2")
    quiet_trainer(EditLedger(tmp_path)).fit(build("gpt2"), DataLoader(batches()[:2], batch_size=None))
    for path in tmp_path.glob("snapshot_*"):
        path.unlink()
    module, ledger = build("gpt2"), EditLedger(tmp_path, ledger=Ledger.open(tmp_path))
    quiet_trainer(ledger).fit(module, DataLoader(batches()[2:], batch_size=None))
    for matrix, other, original in zip(module.edited_matrices().values(), expected[-1], originals, strict=True):
        assert distance(matrix.weight(), other, original) < TOLERANCE["gpt2"]


def test_one_pass_over_all_neurons_of_the_first_batch_is_memit():
    _, originals, _ = by_hand("gpt2")
    memit = reference.ReferenceEditor("memit", "gpt2")
    memit.edit(reference.BATCHES[0])
    module = build("gpt2", smallest_residual=0.0, largest_residual=None, passes=1, neuron_share=1.0)
    quiet_trainer().fit(module, DataLoader(batches()[:1], batch_size=None))
    for layer, matrix in zip(module.layers, module.edited_matrices().values(), strict=True):
        assert distance(matrix.weight(), memit.weight(layer), originals[layer]) < 1e-10


def test_a_value_that_is_not_finite_is_refused_and_not_left_out(monkeypatch):
    module, optimise = build("gpt2"), NSE.optimise

    def broken(self, requests, site):
        values = optimise(self, requests, site)
        values.target[0] = torch.nan
        return values

    monkeypatch.setattr(NSE, "optimise", broken)
    module.prepare()
    report = module.edit(batches()[0].requests)
    assert report.refused == "the update is not finite"


def test_values_are_those_of_the_original_weights_under_a_restraint_too():
    """Whatever the earlier edits have done and a restraint withholds."""
    module, alone = build("gpt2"), build("gpt2")
    quiet_trainer(PRUNE(30.0)).fit(module, DataLoader(batches()[:2], batch_size=None))
    alone.prepare()
    (batch,) = batches()[2:]
    before = [matrix.weight().clone() for matrix in module.edited_matrices().values()]
    losses = [detail["losses"] for detail in module.compute_update(batch.requests)[1]]
    assert losses == [detail["losses"] for detail in alone.compute_update(batch.requests)[1]]
    assert all(
        torch.equal(old, matrix.weight()) for old, matrix in zip(before, module.edited_matrices().values(), strict=True)
    )


@pytest.mark.parametrize("kind", ["mean", "cap"])
def test_an_anchor_sets_the_norm_of_the_values_of_the_original_weights(kind, monkeypatch):
    """v* = W0 k + delta, as the edited matrix of the last layer is asked for it before any edit."""
    first, second, _ = batches()
    plain = build("gpt2")
    plain.prepare()
    model, last = plain.language_model, plain.layers[-1]
    with monkeypatch.context() as patch:
        patch.setattr(type(plain), "coming_requests", lambda self, count: list(first.requests))
        module = build("gpt2")
        module.value = replace(module.value, anchor=kind)
        module.prepare()

    def written(requests, prefixes):
        found = []
        for request, target, start in zip(requests, *solved(requests, prefixes), strict=True):
            ids = model.tokens.encode(request.prompt[: request.subject_end])
            with torch.no_grad(), capture(outputs=[model.rewrite_module(last)], stop=False) as seen:
                model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            found.append(seen.outputs[0][0, -1] + target - start)
        return torch.stack(found)

    def solved(requests, prefixes):
        values = optimise_values(model, plain.rows(requests, prefixes), ShiftSite(last, "block"), plain.value)
        return values.target, values.reference

    anchor = float(written(first.requests, ("",)).norm(dim=1).mean())
    assert module.facts[f"anchor_norm/{last}"] == pytest.approx(anchor, rel=1e-10)
    norms = written(second.requests, plain.prefixes).norm(dim=1)
    details = module.compute_update(second.requests)[1]
    assert [detail["norm_ratio"] for detail in details] == pytest.approx((norms / anchor).tolist(), rel=1e-9)


def test_values_of_the_first_layer_cannot_be_replayed():
    with pytest.raises(UserError, match=r"method\.spread is expected to be 'share'"):
        build("gpt2", spread="replay")


def test_a_batch_that_is_out_of_range_writes_nothing():
    module = build("gpt2", smallest_residual=1e6, largest_residual=None)
    module.prepare()
    updates, details = module.compute_update(batches()[0].requests)
    assert updates == {}
    assert [(detail["passes"], len(detail["residuals"])) for detail in details] == [(0, 1), (0, 1)]
    write(module, batches()[0].requests, updates)
    assert module.run.last_report.applied


def test_the_longest_prefix_within_the_share_at_least_one():
    score = torch.tensor([1.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    assert largest_scores(score, 0.7).tolist() == [1, 2]
    assert largest_scores(score, 0.69).tolist() == [1]
    assert largest_scores(score, 0.1).tolist() == [1]
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert len(largest_scores(thirds, 1.0)) == 3


@pytest.mark.parametrize(
    "options",
    [{"passes": 0}, {"neuron_share": 0.0}, {"smallest_residual": 2.0, "largest_residual": 1.0}],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(UserError, match="NSE expects"):
        build("gpt2", **options)


ORACLES = SHARED / "oracles"


class Published(NSE):
    """Values of the target without its leading space: the public code computes them beforehand and forgets it."""

    def rows(self, requests, prefixes=None):
        model, found = self.language_model, []
        for request, spaced in zip(requests, super().rows(requests, prefixes), strict=True):
            target = model.tokens.encode(request.target_new)
            begun = request.prompt + model.tokens.tokenizer.decode(target[:-1])
            texts = [prefix + begun for prefix in (self.prefixes if prefixes is None else prefixes)]
            rows = tuple(
                EditRow(model.tokens.encode(text), row.subject, target)
                for text, row in zip(texts, spaced.targets, strict=True)
            )
            found.append(replace(spaced, targets=rows))
        return found


@pytest.mark.skipif(not ORACLES.is_dir(), reason="the oracles are not part of the project")
@pytest.mark.parametrize(("variant", "kind"), [("spaced", NSE), ("released", Published)])
def test_matches_the_public_code(variant, kind, monkeypatch):
    chosen = []

    def recorded(score, share):
        chosen.append(largest_scores(score, share))
        return chosen[-1]

    monkeypatch.setattr("prune_lightning.methods.nse.largest_scores", recorded)
    facts = json.loads((ORACLES / "oracles_2026.json").read_text())
    setting = facts["methods"]["nse"]["hyper_parameters"]
    tensors, moments = (load_file(ORACLES / f"{name}.safetensors") for name in ("oracles_2026", "oracles"))
    module = kind(
        language_model=load_language_model(str(ORACLES / "oracle-gpt2"), "float64"),
        layers=setting["layers"],
        second_moments=GivenMoments(moments),
        value=ValueOptions(steps=20, clamp=setting["clamp_norm_factor"]),
        contexts=ContextOptions(fixed=[context.removesuffix("{}") for context in facts["memit_contexts"][1]]),
        ridge=setting["mom2_update_weight"],
        smallest_residual=setting["alpha"],
        largest_residual=setting["upper_bound"],
        passes=setting["max_iterations"] - 1,
        neuron_share=setting["neuron_threshold"],
    )
    module.prepare()
    requests = [
        EditRequest(r["case_id"], r["subject"], r["prompt"], r["target_new"], r["target_true"])
        for r in facts["requests"]
    ]
    values = module.optimise(requests, ShiftSite(module.layers[-1], "block"))
    assert relative(values.target, tensors[f"nse.{variant}.z"]) < 1e-6
    originals = {name: matrix.parameter.clone() for name, matrix in module.edited_matrices().items()}
    for batch in (0, 1):
        chunk = requests[4 * batch : 4 * batch + 4]
        updates, details = module.compute_update(chunk)
        write(module, chunk, updates)
        for number in range(module.passes if variant == "spaced" else 0):
            active = tensors.get(f"nse.spaced.batch{batch}.pass{number}.active", torch.empty(0)).tolist()
            norms = [detail["residuals"][number] for detail in details]
            low, high = setting["alpha"], setting["upper_bound"]
            assert [r.case_id for r, norm in zip(chunk, norms, strict=True) if low < norm < high] == active
            for layer in module.layers if active else ():
                neurons = tensors[f"nse.spaced.batch{batch}.pass{number}.neurons.{layer}"]
                assert sorted(chosen.pop(0).tolist()) == sorted(neurons.tolist())
        for layer, (name, matrix) in zip(module.layers, module.edited_matrices().items(), strict=True):
            theirs = tensors[f"nse.{variant}.batch{batch}.weight.{layer}"]
            assert relative(matrix.parameter, theirs, originals[name]) < 1e-6
