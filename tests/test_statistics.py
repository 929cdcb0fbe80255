"""Second moments against a dense computation, and their life on disk."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import BUNDLED, ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_configs import compose
from test_train import train

from prune_lightning.bundled.corpus import BundledCorpus
from prune_lightning.data.corpus import TextCorpus
from prune_lightning.errors import UserError
from prune_lightning.models.hooks import capture
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.second_moment import Keep, SecondMoment
from prune_lightning.models.self_sampled import SampledText, SelfSampledCorpus, sample_texts
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.phases import PhaseClock
from prune_lightning.tasks.presets import settled

SHARES = {"facts": 0.5, "text": 0.5}


class Counted(BundledCorpus):
    """Counts the texts that are read, and can be cut off like a killed process."""

    def __init__(self, samples=120, stop_after=None):
        super().__init__(samples, SHARES)
        self.read, self.stop_after = 0, stop_after

    def texts(self):
        for text in super().texts():
            if self.read == self.stop_after:
                raise KeyboardInterrupt
            self.read += 1
            yield text


def dense(model, layer, texts, max_length):
    """One text at a time, no padding."""
    total, count = 0, 0
    for text in texts:
        ids = torch.tensor([model.tokens.encode(text)[:max_length]])
        with torch.no_grad(), capture(inputs=[model.rewrite_module(layer)]) as seen:
            model(ids, torch.ones_like(ids))
        keys = seen.inputs[0][0].double()
        total, count = total + keys.T @ keys, count + len(keys)
    return total / count, count


def test_against_one_text_at_a_time(bundled_shared):
    moments = SecondMoments(Counted(60), max_length=24, token_budget=300)
    found = moments.compute(bundled_shared, [0, 2])
    for layer in (0, 2):
        expected, count = dense(bundled_shared, layer, BundledCorpus(60, SHARES).texts(), 24)
        assert torch.allclose(found[layer].matrix, expected, rtol=1e-4, atol=1e-6)
        assert moments.num_tokens == count
    ridge = (
        SecondMoments(Counted(60), max_length=24, ridge=0.5, token_budget=300).compute(bundled_shared, [0])[0].matrix
    )
    plain = found[0].matrix
    assert torch.allclose(ridge, plain + 0.5 * plain.diagonal().mean() * torch.eye(len(plain)), rtol=1e-6, atol=1e-8)


def test_max_tokens_is_met_exactly(bundled_shared):
    moments = SecondMoments(Counted(120), max_tokens=500)
    moments.compute(bundled_shared, [0])
    assert moments.num_tokens == 500


def test_convergence_falls_with_the_number_of_texts(bundled_shared):
    changes = []
    for samples in (40, 1500):
        moments = SecondMoments(Counted(samples), token_budget=512)
        moments.compute(bundled_shared, [0])
        changes.append(moments.convergence)
    assert 0 < changes[1] < changes[0] < 1


def test_the_bundled_models_are_shipped_with_it(bundled_shared, monkeypatch):
    """What the default run reads is what it would have taken; a damaged model or another corpus is not served."""
    config = OmegaConf.load(ROOT / "configs" / "model" / "bundled.yaml").second_moments
    shipped = instantiate(config, _convert_="all")
    taken = instantiate(config, shipped=None, _convert_="all").compute(bundled_shared, [1])[1].matrix
    with monkeypatch.context() as patched:
        patched.setattr(SecondMoments, "take", None)
        read = shipped.compute(bundled_shared, [0, 1])[1].matrix
    assert torch.allclose(read, taken, rtol=1e-5, atol=1e-6 * float(taken.abs().max()))
    shipped.max_length = 20
    assert not torch.allclose(shipped.compute(bundled_shared, [1])[1].matrix, taken, rtol=1e-3)


def test_kept_on_disk_and_read_back_bit_for_bit(bundled_shared, tmp_path):
    first = SecondMoments(Counted(), cache=tmp_path).compute(bundled_shared, [0, 1])
    corpus = Counted()
    again = SecondMoments(corpus, cache=tmp_path).compute(bundled_shared, [1])
    assert corpus.read == 0
    assert torch.equal(first[1].matrix, again[1].matrix)


def test_other_settings_models_or_texts_are_recomputed(bundled_shared, tmp_path):
    SecondMoments(Counted(), cache=tmp_path).compute(bundled_shared, [0])
    edited = load_language_model(BUNDLED)
    with torch.no_grad():
        edited.rewrite_module(0).weight.add_(1e-3)
    for model, corpus, settings in (
        (bundled_shared, Counted(121), {}),
        (bundled_shared, Counted(), {"max_length": 9}),
        (edited, Counted(), {}),
    ):
        SecondMoments(corpus, cache=tmp_path, **settings).compute(model, [0])
        assert corpus.read > 0


def test_an_interrupted_pass_is_resumed_bit_equal(bundled_shared, tmp_path):
    settings = {"save_every": 32, "token_budget": 300}
    whole = SecondMoments(Counted(), cache=tmp_path / "a", **settings).compute(bundled_shared, [0, 1])
    with pytest.raises(KeyboardInterrupt):
        SecondMoments(Counted(stop_after=100), cache=tmp_path / "b", **settings).compute(bundled_shared, [0, 1])
    resumed = SecondMoments(Counted(), cache=tmp_path / "b", **settings)
    forwards = []
    handle = bundled_shared.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    found = resumed.compute(bundled_shared, [0, 1])
    handle.remove()
    assert all(torch.equal(whole[layer].matrix, found[layer].matrix) for layer in (0, 1))
    assert len(forwards) < 12  # 24 of the 120 texts were left
    assert not list((tmp_path / "b").rglob("unfinished*"))


def test_damaged_and_foreign_files_are_named(bundled_shared, tmp_path):
    SecondMoments(Counted(), cache=tmp_path).compute(bundled_shared, [0])
    SecondMoments(Counted(90), cache=tmp_path).compute(bundled_shared, [0])
    one, other = tmp_path.rglob("layer_0.safetensors")
    for content, message in (
        (other.read_bytes(), "another model or corpus"),
        (other.read_bytes()[:1000], "is damaged"),
    ):
        one.write_bytes(content)
        messages = []
        for samples in (120, 90):
            try:
                SecondMoments(Counted(samples), cache=tmp_path).compute(bundled_shared, [0])
            except UserError as error:
                messages.append(str(error))
        assert len(messages) == 1
        assert message in messages[0]
        assert str(one) in messages[0]


def test_the_job_takes_them_alone(tmp_path):
    arguments = ["experiment=statistics", "progress=false", f"+model.second_moments.cache={tmp_path}"]
    arguments += ["model.second_moments.corpus.samples=50", f"hydra.run.dir={tmp_path / 'run'}"]
    done = train(*arguments, "method=memit")
    assert done.returncode == 0, done.stderr
    assert "layers [0, 1]" in done.stdout
    assert len(list(tmp_path.rglob("layer_*.safetensors"))) == 2
    done = train("experiment=statistics", "progress=false", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "cache=FOLDER" in done.stderr


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_of_fewer_tokens_than_keys_are_wide(dtype, stored, tmp_path):
    """Rounding of the sums to fp32 neither hides the deficient rank nor turns the solution."""
    tokens, model = 40, load_language_model(BUNDLED, dtype)
    corpus = BundledCorpus(60, SHARES)
    moments = SecondMoments(corpus, max_tokens=tokens, cache=tmp_path if stored else None)
    texts, ids = corpus.texts(), []
    while sum(map(len, ids)) < tokens:
        ids.append(model.tokens.encode(next(texts))[: tokens - sum(map(len, ids))])
    with torch.no_grad(), capture(inputs=[model.rewrite_module(0)]) as seen:
        padded, mask = model.tokens.pad(ids, model.device)
        model(padded, mask)
    keys = seen.inputs[0][mask.bool()].double()
    assert len(keys) == tokens
    size = keys.shape[1]
    rank = int(torch.linalg.matrix_rank(keys))  # a token may come twice
    assert rank <= tokens
    with pytest.warns(UserWarning, match=f"{size - rank} of {size} eigenvalues vanish"):
        found = moments.compute(model, [0])[0]

    # Where C vanishes its inverse has no bound: what solves it lies there, exactly so in the limit.
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(size, 5, generator=generator, dtype=torch.float64).abs()
    _, values, inside = torch.linalg.svd(keys, full_matrices=False)
    inside = inside[values > values[0] * size * torch.finfo(torch.float64).eps]
    outside = wanted - inside.T @ (inside @ wanted)
    cosine = torch.nn.functional.cosine_similarity(found.solve(wanted), outside, dim=0)
    with pytest.warns(UserWarning, match=f"{size - rank} of {size}"):
        exact = SecondMoment(keys.T @ keys / tokens).solve(wanted)
    # The floor, 1e-7 of the trace, over the smallest eigenvalue above it, 5e-4 of the trace, turns it by 1e-3 at most.
    assert float(cosine.min()) > 1 - 1e-6
    assert float(torch.nn.functional.cosine_similarity(found.solve(wanted), exact, dim=0).min()) > 1 - 1e-6


def test_a_full_moment_is_solved_by_its_factor(bundled_shared, recwarn):
    """The precision of the sums decides about rank alone: what has full rank keeps its bits."""
    moment = SecondMoments(BundledCorpus(400, SHARES), max_tokens=4000).take(bundled_shared, [0])[0]
    keys = torch.randn(moment.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = SecondMoment(moment, torch.float32).solve(keys)
    torch.testing.assert_close(found, SecondMoment(moment).solve(keys), rtol=0, atol=0)
    assert not [warning for warning in recwarn if "eigenvalues" in str(warning.message)]


def test_rounding_that_leaves_a_positive_definite_matrix_is_seen():
    """One direction is missing; fp32 rounding has put a positive eigenvalue in its place."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, 8, dtype=torch.float64, generator=generator)
    keys[:, 7] = keys[:, :7].mean(1)
    exact = keys.T @ keys / 30
    noisy = exact + 2e-8 * exact.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert not torch.linalg.cholesky_ex(noisy).info
    with pytest.warns(UserWarning, match="1 of 8 eigenvalues vanish"):
        SecondMoment(noisy, torch.float32)


@pytest.mark.parametrize("decades", [2, 5, 7])
def test_a_moment_kept_in_fp32_solves_as_in_fp64(decades):
    """Refinement gains what fp32 has beyond the condition; the condition of the problem remains."""
    size, generator = 60, torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    moment = ((turn * torch.logspace(0, -decades, size, dtype=torch.float64)) @ turn.T).float().double()
    moment, keys = (moment + moment.T) / 2, torch.randn(size, 3, generator=generator, dtype=torch.float64)
    single = SecondMoment(moment, keep=Keep(dtype="float32"))
    kept = [value for value in vars(single).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in kept) == 2 * size**2 * 4
    expected = torch.linalg.solve(single.matrix, keys)
    error = float((single.solve(keys) - expected).norm() / expected.norm())
    assert error < 20 * torch.finfo(torch.float64).eps * 10**decades
    inverse = torch.linalg.inv(single.matrix)
    error = float((single.inverse() - inverse).norm() / inverse.norm())
    assert error < 20 * torch.finfo(torch.float64).eps * 10**decades


def test_a_moment_that_fp32_cannot_factor_keeps_its_factor_in_fp64():
    size = 40
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    moment = (turn * torch.logspace(0, -10, size, dtype=torch.float64)) @ turn.T
    with pytest.warns(UserWarning, match="its factor is kept in fp64"):
        kept = SecondMoment((moment + moment.T) / 2, keep=Keep(dtype="float32"))
    keys = torch.ones(size, 1, dtype=torch.float64)
    expected = SecondMoment((moment + moment.T) / 2).solve(keys)
    torch.testing.assert_close(kept.solve(keys), expected, rtol=0, atol=0)


# -- text that the model samples itself -------------------------------------------------------------------------------
FEW = SampledText(tokens_per_key=0.5, length=16, rows=8)


def test_own_text_is_a_draw_from_the_model(bundled_shared):
    """Next tokens of many texts from one opening have the model's own frequencies."""
    opening = "The capital of"
    options = SampledText(openings=(opening,), length=1, rows=512)
    texts = list(sample_texts(bundled_shared, options, 512, PhaseClock()))
    ids = bundled_shared.tokens.encode(opening)
    row = torch.tensor([ids])
    expected = bundled_shared(row, torch.ones_like(row))[0, -1].softmax(0)
    drawn = torch.tensor([bundled_shared.tokens.encode(text)[len(ids)] for text in texts if text != opening])
    found = torch.bincount(drawn, minlength=len(expected)) / 512
    likely = expected > 0.02
    assert likely.sum() > 3
    # five standard deviations of a binomial share
    assert ((found - expected)[likely].abs() < 5 * (expected * (1 - expected) / 512).sqrt()[likely]).all()


def test_own_text_has_as_many_tokens_as_asked_and_depends_on_the_seed_alone(bundled_shared):
    corpus = SelfSampledCorpus(bundled_shared, FEW, bundled_shared.key_size(0))
    torch.manual_seed(5)
    texts = list(corpus.texts())
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "the global generator is left as it was"
    assert len(texts) == len(corpus) == math.ceil(0.5 * 768 / 16)
    # A batch depends on the seed and its number alone.
    assert list(sample_texts(bundled_shared, FEW, 8, PhaseClock())) == texts[:8]
    assert list(SelfSampledCorpus(bundled_shared, replace(FEW, seed=1), 768).texts()) != texts
    assert len(set(texts)) == len(texts)
    assert all(text.startswith(opening) for text, opening in zip(texts, FEW.openings * 2, strict=False))


def test_own_text_is_kept_for_the_model_and_the_settings(bundled_shared, tmp_path, monkeypatch):
    settings = {"corpus": "self", "cache": tmp_path, "sampled": FEW}
    first = SecondMoments(**settings)
    found = first.compute(bundled_shared, [0])[0].matrix
    expected, _ = dense(bundled_shared, 0, first.corpus.texts(), 1024)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    with monkeypatch.context() as patched:
        patched.setattr("prune_lightning.models.self_sampled.sample_texts", None)
        SecondMoments(**settings).compute(bundled_shared, [1])  # the text is read again for another layer
        with pytest.raises(TypeError):
            SecondMoments(**settings | {"sampled": replace(FEW, seed=1)}).compute(bundled_shared, [0])
        edited = load_language_model(BUNDLED)
        with torch.no_grad():
            edited.rewrite_module(0).weight.add_(1e-3)
        with pytest.raises(TypeError):
            SecondMoments(**settings).compute(edited, [0])


def test_own_text_is_no_longer_than_what_the_method_reads(bundled_shared, tmp_path):
    width = bundled_shared.key_size(0)
    few, same = SecondMoments("self", sampled=FEW, cache=tmp_path), replace(FEW, tokens_per_key=0.25)
    found = few.compute(bundled_shared, [0], tokens_per_feature=0.25)[0].matrix
    (file,) = (tmp_path / "sampled_text").iterdir()
    assert len(json.loads(file.read_text())) == math.ceil(0.25 * width / 16)
    assert few.num_tokens == 0.25 * width
    expected = SecondMoments("self", sampled=same, max_tokens=math.ceil(0.25 * width))
    assert torch.allclose(found, expected.compute(bundled_shared, [0])[0].matrix, rtol=1e-6, atol=0)  # kept in fp32
    assert few.summary()["corpus"] == expected.summary()["corpus"]
    assert torch.equal(few.compute(bundled_shared, [0], tokens_per_feature=0.25)[0].matrix, found), "asked again"
    whole = few.compute(bundled_shared, [0], tokens_per_feature=9)[0].matrix
    assert torch.equal(whole, SecondMoments("self", sampled=FEW, cache=tmp_path).compute(bundled_shared, [0])[0].matrix)


def test_own_text_takes_the_place_of_a_corpus_that_is_out_of_reach(bundled_shared, tmp_path, monkeypatch):
    monkeypatch.setattr("prune_lightning.data.corpus.hub_is_offline", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=None))
    settings = {"cache": tmp_path, "sampled": FEW}
    with pytest.raises(UserError, match="'wikimedia/wikipedia' is no local file, and the hub cannot be reached"):
        SecondMoments(TextCorpus("wikimedia/wikipedia"), **settings).compute(bundled_shared, [0])
    falling = SecondMoments(TextCorpus("wikimedia/wikipedia"), **settings, fallback=True)
    with pytest.warns(UserWarning, match="text that the model samples itself"):
        found = falling.compute(bundled_shared, [0])[0].matrix
    assert torch.equal(found, SecondMoments("self", **settings).compute(bundled_shared, [0])[0].matrix)
    assert falling.summary()["corpus"].startswith("sampled")
    with pytest.raises(UserError, match="does not exist"):
        SecondMoments(TextCorpus("./nowhere.txt"), **settings, fallback=True).compute(bundled_shared, [0])
    with pytest.raises(UserError, match=r"unknown model\.second_moments\.corpus 'own': choose from 'self'"):
        SecondMoments("own")


@pytest.mark.parametrize(
    ("overrides", "falls_back"),
    [((), True), (("model.second_moments.corpus=self",), True), (("model.second_moments.corpus.path=a/b",), False)],
)
def test_a_corpus_that_the_user_names_is_not_replaced(overrides, falls_back, tmp_path, monkeypatch):
    words = ["model=auto", "model.path=x", "method=kn", *overrides]
    monkeypatch.setattr("prune_lightning.tasks.presets.overrides", lambda: words)
    assert settled(compose(*words)).model.second_moments.fallback is falls_back
