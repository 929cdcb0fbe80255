"""Options that later papers added to MEMIT and AlphaEdit, each against its dense statement."""

from __future__ import annotations

import lightning as L
import pytest
import reference_editors as reference
import torch
from conftest import quiet_trainer, write
from test_reference_editors import Texts, batches, build
from torch.utils.data import DataLoader

from prune_lightning.errors import UserError
from prune_lightning.methods.alphaedit import AlphaEdit
from prune_lightning.methods.memit import MEMIT
from prune_lightning.methods.nse import NSE
from prune_lightning.models.contexts import ContextOptions
from prune_lightning.models.hooks import capture, edit_output
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.types import EditBatch

LAYER, N, M, B = 1, 32, 32, 3


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind, **options):
    module = kind(
        language_model=LanguageModel(*reference.tiny_model("gpt2")),
        layers=[LAYER],
        second_moments=SecondMoments(Texts(), ridge=0.1),
        contexts=ContextOptions(fixed=reference.PREFIXES[1:]),
        **options,
    )
    module.prepare()
    return module


def close(ours, theirs) -> bool:
    return float((ours - theirs).norm()) < 1e-10 * float(theirs.norm())


@pytest.mark.parametrize("past", [False, True])
def test_norm_penalty_adds_the_identity_to_the_bracket(past):
    module = made(MEMIT, ridge=4.0, norm_penalty=2.5, accumulate_past_keys=past)
    bracket = 4 * module.moments[LAYER].matrix + 2.5 * torch.eye(N, dtype=torch.float64)
    for batch in range(2):
        keys, residual = normal(N, B, seed=batch), normal(M, B, seed=10 + batch)
        expected = residual @ keys.T @ torch.linalg.inv(bracket + keys @ keys.T)
        assert close(module.solve(LAYER, keys, residual).dense(), expected)
        if past:
            module.remember({str(LAYER): keys})
            bracket = bracket + keys @ keys.T


def test_a_null_space_that_holds_much_of_the_keys_is_named(recwarn):
    with pytest.warns(UserWarning, match=r"100% of the energy .*little is preserved"):
        whole = made(AlphaEdit, null_threshold=1e9)
    assert whole.facts[f"projector_energy/{LAYER}"] == pytest.approx(1.0)
    moment = whole.moments[LAYER].matrix
    values = torch.linalg.eigvalsh(moment)
    module = made(AlphaEdit, null_threshold=float(values[2]))
    null = module._null[LAYER]
    assert module.facts[f"projector_energy/{LAYER}"] == pytest.approx(float(values[:2].sum() / values.sum()))
    share = float((null.T @ moment @ null).trace() / moment.trace())
    assert module.facts[f"projector_energy/{LAYER}"] == pytest.approx(share)
    assert not [w for w in recwarn if "little is preserved" in str(w.message)]


@pytest.mark.parametrize("refresh_every", [None, 4])
def test_beta_edit_equals_its_dense_solve(refresh_every):
    """X = solve(P (K K' + A + l1 C) + l2 I, P K R'); P from the eigenvalues of (A/t + l1 C)/(1 + l1)."""
    module = made(AlphaEdit, null_threshold=0.3, ridge=10.0, preserve=5.0, refresh_every=refresh_every)
    moment, past, edits = module.moments[LAYER].matrix, torch.zeros(N, N, dtype=torch.float64), 0
    ranks, searched = [], moment
    for batch in range(5):
        values, vectors = torch.linalg.eigh(searched)
        null = vectors[:, values < 0.3]
        ranks.append(null.shape[1])
        projector = null @ null.T
        keys, residual = 3 * normal(N, B, seed=batch), normal(M, B, seed=10 + batch)
        bracket = projector @ (keys @ keys.T + past + 5 * moment) + 10 * torch.eye(N, dtype=torch.float64)
        expected = torch.linalg.solve(bracket, projector @ keys @ residual.T).T
        assert close(module.solve(LAYER, keys, residual).dense(), expected)
        if batch == 2:  # a resumed run goes on from here
            memory = {name: tensor.clone() for name, tensor in module.memory().items()}
            module = made(AlphaEdit, null_threshold=0.3, ridge=10.0, preserve=5.0, refresh_every=refresh_every)
            module.load_memory(memory)
        module.remember({str(LAYER): keys})
        past, edits = past + keys @ keys.T, edits + B
        if refresh_every and (edits - B) // refresh_every != edits // refresh_every:
            searched = (past / edits + 5 * moment) / 6
    assert min(ranks) > 0
    assert (len(set(ranks)) > 1) == (refresh_every is not None)
    module.forget()
    again = made(AlphaEdit, null_threshold=0.3, ridge=10.0, preserve=5.0)
    keys, residual = normal(N, B, seed=0), normal(M, B, seed=1)
    assert close(module.solve(LAYER, keys, residual).dense(), again.solve(LAYER, keys, residual).dense())


def test_replayed_values_are_those_to_which_the_first_layers_shift_leads(monkeypatch):
    """Each layer gets the whole difference between the replayed and the present hidden state."""
    module, residuals, found = build("memit", "gpt2"), {}, {}
    module.spread = "replay"
    module.prepare()
    solve, optimise = module.solve, module.optimise
    requests, model = batches()[1].requests, module.language_model
    rows = [model.tokens.encode(request.prompt[: request.subject_end]) for request in requests]

    def hidden(shifts=None):
        """The blocks' outputs at the subject, from plain passes of one request each."""
        result = {layer: [] for layer in module.layers}
        for i, ids in enumerate(rows):

            def add(output, i=i):
                output = output.clone()
                output[0, -1] += 0 if shifts is None else shifts[i]
                return output

            blocks = [model.block(layer) for layer in module.layers]
            with torch.no_grad(), edit_output(blocks[0], add), capture(outputs=blocks, stop=False) as seen:
                model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            for place, layer in enumerate(module.layers):
                result[layer].append(seen.outputs[place][0, -1])
        return {layer: torch.stack(of).T for layer, of in result.items()}

    def optimised(*args):
        found["values"] = optimise(*args)
        return found["values"]

    def solved(layer, keys, residual):
        residuals[layer] = residual, hidden()[layer]
        return solve(layer, keys, residual)

    monkeypatch.setattr(module, "optimise", optimised)
    monkeypatch.setattr(module, "solve", solved)
    updates, _ = module.compute_update(requests)
    wanted = hidden(found["values"].target - found["values"].reference)
    for layer, (residual, present) in residuals.items():
        assert close(residual, wanted[layer] - present)
    write(module, requests, updates)


def test_the_budget_of_tokens_counts_per_feature(tmp_path):
    """Statistics of the whole corpus are used where they are there."""
    model = LanguageModel(*reference.tiny_model("gpt2"))
    every = sum(len(model.tokens.encode(text)) for text in reference.TEXTS)
    few = SecondMoments(Texts(), cache=tmp_path / "few")
    ours = few.compute(model, [0, LAYER], tokens_per_feature=1.25)[LAYER].matrix
    assert few.num_tokens == 40 < every
    ids = [token for text in reference.TEXTS for token in model.tokens.encode(text)]
    keys, left = [], 40
    for text in reference.TEXTS:
        row = model.tokens.encode(text)[:left]
        left -= len(row)
        if row:
            with torch.no_grad(), capture(inputs=[model.rewrite_module(LAYER)]) as seen:
                model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
            keys.append(seen.inputs[0][0])
    keys = torch.cat(keys)
    assert len(ids) == every
    # The cache keeps fp32.
    assert torch.allclose(ours, keys.T @ keys / 40, rtol=0, atol=1e-6 * float(ours.abs().max()))
    again = SecondMoments(Texts(), cache=tmp_path / "few")
    assert torch.equal(again.compute(model, [LAYER], tokens_per_feature=1.25)[LAYER].matrix, ours)
    assert not again.num_tokens, "read from the cache"
    whole = SecondMoments(Texts(), cache=tmp_path / "whole")
    expected = whole.compute(model, [LAYER])[LAYER].matrix
    again = SecondMoments(Texts(), cache=tmp_path / "whole")
    assert torch.equal(again.compute(model, [LAYER], tokens_per_feature=1.25)[LAYER].matrix, expected)


def test_edits_replay_in_a_stream():
    module = build("alphaedit", "gpt2")
    module.spread = "replay"
    quiet_trainer().fit(module, DataLoader(batches(), batch_size=None))
    assert module.num_requests == len(reference.FACTS)


def test_options_out_of_range_are_refused():
    with pytest.raises(UserError, match="norm_penalty"):
        made(MEMIT, ridge=1.0, norm_penalty=-1.0)
    with pytest.raises(UserError, match="refresh_every"):
        made(AlphaEdit, refresh_every=0, preserve=1.0)
    with pytest.raises(UserError, match=r"method\.preserve \(BetaEdit has 3000\)"):
        made(AlphaEdit, refresh_every=1000)
    with pytest.raises(UserError, match=r"method\.spread"):
        made(MEMIT, ridge=1.0, spread="all")


def in_fp32(kind, **options):
    """A method on second moments of fewer tokens than a key has entries, summed in fp32."""
    model, tokenizer = reference.tiny_model("gpt2")
    module = kind(
        language_model=LanguageModel(model.float(), tokenizer),
        layers=[LAYER],
        second_moments=SecondMoments(Texts(), max_tokens=12),
        contexts=ContextOptions(fixed=reference.PREFIXES[1:]),
        **options,
    )
    module.prepare()
    return module


@pytest.mark.filterwarnings("ignore:the second moment is not positive definite")
def test_moments_of_few_tokens_are_the_same_in_every_bracket():
    """Eigenvalues that are only rounding, some of them negative, count as their bound, as in MEMIT's own solve."""
    keys, residual = normal(N, B, seed=0), normal(M, B, seed=1)
    memit = in_fp32(MEMIT, ridge=4.0)
    values = torch.linalg.eigvalsh(memit.moments[LAYER].matrix)
    assert values[0] < 0 < values[-1]
    expected = memit.solve(LAYER, keys, residual).dense()
    nse = in_fp32(NSE, ridge=4.0).solve(LAYER, keys, residual).dense()
    penalised = in_fp32(MEMIT, ridge=4.0, norm_penalty=1e-12).solve(LAYER, keys, residual).dense()
    # The condition is 1e7, so that fp64 leaves nine digits.
    assert float((nse - expected).norm()) < 1e-8 * float(expected.norm())
    assert float((penalised - expected).norm()) < 1e-5 * float(expected.norm())


def test_a_step_with_a_key_that_is_not_finite_is_refused_and_leaves_no_trace():
    module, other = build("alphaedit", "gpt2"), build("alphaedit", "gpt2")
    good, broken = batches()[0].requests, [request for batch in batches() for request in batch.requests]
    for each in (module, other):
        each.prepare()
        each.edit(good)
        each.run.settle()
    before = {name: matrix.weight().clone() for name, matrix in module.edited_matrices().items()}
    embedding = module.language_model.model.get_input_embeddings().weight
    (word,), saved = module.language_model.tokens.encode("Berg"), embedding.clone()
    embedding[word] = torch.nan
    report = module.edit(broken)
    module.run.settle()
    assert report.refused == "the update is not finite"
    assert all(torch.equal(matrix.weight(), before[name]) for name, matrix in module.edited_matrices().items())
    embedding.copy_(saved)
    assert all(torch.equal(module.memory()[name], tensor) for name, tensor in other.memory().items())


def test_keys_of_a_model_that_has_broken_down_protect_nothing():
    module = build("alphaedit", "gpt2")
    module.prepare()
    module.edit(batches()[0].requests)
    module.language_model.model.get_input_embeddings().weight.fill_(torch.nan)
    module.run.settle()
    for layer in module.layers:
        assert torch.equal(module.memory()[str(layer)], module.unprotected_inverse(layer))


@pytest.mark.parametrize("method", ["memit_past", "alphaedit"])
def test_where_every_step_starts_anew_the_inverse_is_computed_once(method, monkeypatch):
    module, computed, weights = build(method, "gpt2"), [], []
    inverse = module.unprotected_inverse

    def counted(layer):
        computed.append(layer)
        return inverse(layer)

    monkeypatch.setattr(module.protected, "_start", counted)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            weights.append([matrix.weight().clone() for matrix in pl_module.edited_matrices().values()])

    stream = [EditBatch(batch.requests, from_base=True) for batch in batches()]
    quiet_trainer(Watch()).fit(module, DataLoader(stream, batch_size=None))
    assert computed == ([] if method == "memit_past" else list(module.layers))
    for batch, found in zip(stream, weights, strict=True):
        alone = build(method, "gpt2")
        quiet_trainer().fit(alone, DataLoader([EditBatch(batch.requests)], batch_size=None))
        for ours, matrix in zip(found, alone.edited_matrices().values(), strict=True):
            assert torch.equal(ours, matrix.weight())
