"""The editing metrics: by hand, against plain loops, over two processes, on models that cannot speak."""

from __future__ import annotations

import builtins
import math
import random
from dataclasses import replace

import distributed_metrics
import pytest
import torch
from conftest import SHARED
from test_distributed import in_two_processes
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.data.counterfact import CounterFact
from prune_lightning.data.zsre import ZsRE
from prune_lightning.errors import UserError
from prune_lightning.evaluation.counterfact import CounterFactScores
from prune_lightning.evaluation.easyedit import EasyEditScores
from prune_lightning.evaluation.evaluator import Evaluator
from prune_lightning.evaluation.generation import GenerationQuality
from prune_lightning.evaluation.measurement import Measured
from prune_lightning.evaluation.prompts import comparable, spread
from prune_lightning.evaluation.wild import WildGeneration
from prune_lightning.evaluation.zsre import ZsREScores
from prune_lightning.metrics import CaseMeans, CounterFactScore, GenerationScore, TokenMatch
from prune_lightning.metrics.functional import harmonic_mean, ngram_entropy, tfidf_vectorizer
from prune_lightning.models.family import ModelFamily
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import EditRequest, Probe


class BigramConfig(PreTrainedConfig):
    model_type = "bigram"
    num_hidden_layers = 0


class Bigram(PreTrainedModel):
    """Two words; what follows depends on the word before alone."""

    config_class = BigramConfig

    def __init__(self, table):
        super().__init__(BigramConfig(vocab_size=2))
        self.embed = nn.Embedding(2, 2)
        self.lm_head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(2))
            self.lm_head.weight.copy_(torch.tensor(table).log().T)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.embed(input_ids)))


def bigram(table):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b")
    return LanguageModel(Bigram(table), tokenizer, ModelFamily("bigram", "{}", "{}", "{}", []))


@pytest.fixture
def cases():
    stream = BundledWorld(num_edits=4)
    stream.setup()
    extra = {"generation_prompts": ("The old king", "By the river"), "references": ("the king of the north",)}
    probes = (Probe("The capital of Japan is", "Tokyo."),)
    return {i: replace(r, portability=probes, **extra) for i, r in enumerate(stream.requests)}


def silenced(model):
    with torch.no_grad():
        model.rewrite_module(1).weight.fill_(float("nan"))
    return model


def shifted(model):
    """A model whose first choices are others at some places: an edit gone wrong."""
    with torch.no_grad():
        weight = model.rewrite_module(1).weight
        weight += 4 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


def test_counterfact_by_hand_on_two_words():
    """P(a|a) = 3/4, P(b|a) = 1/4, P(a|b) = P(b|b) = 1/2."""
    model = bigram([[0.75, 0.25], [0.5, 0.5]])
    request = EditRequest(
        case_id=0,
        subject="a",
        prompt="a",
        target_new="a a",  # P = 3/4 per token, all first choices
        target_old="b a",  # P = sqrt(1/4 * 1/2)
        paraphrases=("b a", "b"),  # the second: P(a a|b) = sqrt(1/2 * 3/4), P(b a|b) = 1/2
        locality=(Probe("a", "b"), Probe("b b", "b a")),  # P(b|a) = 1/4 against 3/4; 1/2 against sqrt(3/8)
    )
    got = CounterFactScores().measure(model, {0: request}).scores
    old = math.sqrt(1 / 8)
    assert got["efficacy_score"] == got["generalization_score"] == got["efficacy_accuracy"] == 1
    assert got["efficacy_magnitude"] == pytest.approx(3 / 4 - old)
    assert got["generalization_magnitude"] == pytest.approx(((3 / 4 - old) + (math.sqrt(3 / 8) - 1 / 2)) / 2)
    assert got["locality_score"] == got["locality_accuracy"] == got["harmonic_score"] == 0
    assert got["locality_magnitude"] == pytest.approx(((1 / 4 - 3 / 4) + (1 / 2 - math.sqrt(3 / 8))) / 2)


def test_a_tie_is_a_failure():
    request = EditRequest(case_id=0, subject="b", prompt="b", target_new="a", target_old="b")
    got = CounterFactScores().measure(bigram([[0.5, 0.5], [0.5, 0.5]]), {0: request}).scores
    assert (got["efficacy_score"], got["efficacy_magnitude"]) == (0, 0)


def test_harmonic_mean_is_that_of_the_means():
    assert float(harmonic_mean(torch.tensor([96.7, 89.7, 26.6]))) == pytest.approx(50.8, abs=0.05)
    assert float(harmonic_mean(torch.tensor([1.0, 0.0, 1.0]))) == 0
    metric = CounterFactScore()
    low, high = torch.tensor([1.0]), torch.tensor([2.0])
    for case, right in enumerate([("efficacy", "generalization"), ("efficacy", "locality"), ("generalization",)]):
        for kind in metric.KINDS:
            pair = (low, high) if kind in right else (high, low)
            metric.update(kind, *pair, torch.tensor([False]), torch.tensor([case]))
    # Means 2/3, 2/3, 1/3; the harmonic mean of every single case is 0.
    assert float(metric.compute()["harmonic_score"]) == pytest.approx(3 / (1.5 + 1.5 + 3))
    assert float(metric.compute()["harmonic_accuracy"]) == 0


def test_repeated_cases_count_once():
    metric, again = CaseMeans(["x"], counts=["n"]), CaseMeans(["x"], counts=["n"])
    values, case = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([3, 3, 3, 9])
    for name in ("x", "n"):
        metric.update(name, values, case)
        for _ in range(2):
            again.update(name, values, case)
    expected = {"x": pytest.approx((1 / 3 + 1) / 2), "n": 2}
    assert {k: float(v) for k, v in metric.compute().items()} == expected
    assert {k: float(v) for k, v in again.compute().items()} == expected
    assert again.rows([9, 3]) == [{"case": 9, "x": 1.0}, {"case": 3, "x": pytest.approx(1 / 3)}]


def test_prompts_of_a_case_may_be_mixed_with_others():
    mixed, sorted_ = CaseMeans(["x"]), CaseMeans(["x"])
    values, case = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([2, 1, 2, 1, 2])
    mixed.update("x", values, case)
    order = case.argsort()
    sorted_.update("x", values[order], case[order])
    assert float(mixed.compute()["x"]) == float(sorted_.compute()["x"]) == pytest.approx((2 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("y", torch.ones(1), torch.zeros(1)), "unknown name"),
        (("x", torch.ones(2), torch.zeros(1)), "as many cases"),
        (("x", torch.ones(1), torch.tensor([2**24])), "below 16777216"),
    ],
)
def test_what_a_metric_cannot_keep_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        CaseMeans(["x"]).update(*arguments)


def test_nothing_seen_is_no_number():
    with pytest.warns(UserWarning, match="before the ``update``"):
        result = CounterFactScore().compute()
    assert math.isnan(result["efficacy_score"])
    assert math.isnan(result["harmonic_score"])
    assert result["num_nonfinite"] == 0


def test_two_processes_compute_what_one_does(tmp_path):
    both = in_two_processes("distributed_metrics.py", tmp_path)
    for name, sparse in (("all", False), ("sparse", True)):
        alone = distributed_metrics.compute(list(range(distributed_metrics.CASES)), sparse)
        assert {k: float(v) for k, v in both[name].items()} == pytest.approx(
            {k: float(v) for k, v in alone.items()}, abs=1e-6, nan_ok=True
        )
    assert float(both["all"]["num_nonfinite"]) == 3


def first_choices(model, prompt, answer):
    """First choices at the answer's tokens and the tokens themselves, from a pass of this pair alone."""
    pair = model.tokens.encode_pair(prompt, answer)
    choice = model.model(input_ids=torch.tensor([pair.ids])).logits[0].argmax(-1).tolist()
    return choice[pair.target_start - 1 : -1], pair.target


def share(ours, theirs):
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def mean(values):
    return sum(values) / len(values)


def test_zsre_equals_a_plain_loop(bundled, cases):
    model = shifted(bundled)
    asked = {
        "efficacy": lambda r: [(r.prompt, r.target_new)],
        "generalization": lambda r: [(p, r.target_new) for p in r.paraphrases],
        "specificity": lambda r: [(p.prompt, p.answer) for p in r.locality],
    }
    expected = {
        kind: mean([mean([share(*first_choices(model, *pair)) for pair in pairs(r)]) for r in cases.values()])
        for kind, pairs in asked.items()
    }
    got = ZsREScores().measure(model, cases)
    assert {kind: got.scores[kind] for kind in asked} == pytest.approx(expected)
    assert 0 < expected["specificity"] < 1
    assert got.scores["harmonic"] == pytest.approx(3 / sum(1 / value for value in expected.values()))
    assert mean([row["specificity"] for row in got.cases]) == pytest.approx(expected["specificity"])


def test_easyedit_locality_compares_with_the_unedited_model(bundled, cases):
    measurement = EasyEditScores()
    with pytest.raises(UserError, match="take_reference"):
        measurement.measure(bundled, cases)
    measurement.take_reference(bundled, cases)
    assert measurement.measure(bundled, cases).scores["locality_acc"] == 1
    before = {i: [first_choices(bundled, p.prompt, p.answer)[0] for p in r.locality] for i, r in cases.items()}
    model = shifted(bundled)
    expected = mean(
        [
            mean(
                [
                    share(first_choices(model, p.prompt, p.answer)[0], b)
                    for p, b in zip(r.locality, before[i], strict=True)
                ]
            )
            for i, r in cases.items()
        ]
    )
    got = measurement.measure(model, cases).scores
    assert got["locality_acc"] == pytest.approx(expected)
    assert 0 < expected < 1
    part = measurement.measure(model, {2: cases[2]})
    assert part.cases[0]["case"] == 2
    assert got["portability_acc"] == pytest.approx(share(*first_choices(model, "The capital of Japan is", "Tokyo.")))


def test_half_precision_is_compared_in_the_same_batches(tiny, cases):
    """Also if another measurement has scored the same prompts together with others."""
    model, words = tiny("gpt2", torch.bfloat16), random.Random(0)
    names = ["river", "north", "red", "old", "town", "Rome", "Japan", "dog", "cat", "piano", "tall", "sea", "water"]

    def text(count):
        return " ".join(words.choices(names, k=count))

    cases = {
        i: replace(
            request,
            prompt=f"{request.subject} {text(3 * i + 1)}",
            subject_start=0,
            locality=tuple(Probe(text(2 * k + 2), text(3)) for k in range(10)),
        )
        for i, request in cases.items()
    }
    measurement, other = EasyEditScores(), ZsREScores()
    measurement.take_reference(model, cases)
    for some in (cases, {1: cases[1]}, {3: cases[3], 0: cases[0]}):
        with model.kept.while_unchanged():
            other.measure(model, some)
            assert measurement.measure(model, some).scores["locality_acc"] == 1
    with model.kept.while_unchanged():  # where no first choice depends on the batch, at least nothing is reused
        model.kept.put("scores", 1)
        assert [model.kept.get("scores", None) for _ in comparable(model, cases)] == [None] * len(cases)
        assert model.kept.get("scores", None) == 1


def test_a_model_that_is_no_number_fails_everything(bundled, cases):
    measurements = [CounterFactScores(), ZsREScores(), EasyEditScores(), WildGeneration(("bare",)), GenerationQuality()]
    for measurement in measurements:
        measurement.take_reference(bundled, cases)
    silenced(bundled)
    for measurement in measurements:
        scores = dict(measurement.measure(bundled, cases).scores)
        failures = scores.pop("num_nonfinite", None)
        scores = {k: v for k, v in scores.items() if not k.startswith("num_") and not k.startswith("consistency")}
        worst = {name: -1.0 if "magnitude" in name else 0.0 for name in scores}
        assert scores == worst, measurement.name
        assert failures is None or failures > 0
    assert CounterFactScores().measure(bundled, cases).scores["num_nonfinite"] == 4 * (1 + 2 + 5)


@pytest.mark.parametrize("measurement", [CounterFactScores(), ZsREScores()], ids=["counterfact", "zsre"])
def test_of_a_weighted_sample_the_harmonic_mean_is_that_of_the_weighted_means(measurement, cases, bundled):
    evaluator, weights = Evaluator([measurement]), {0: 7.0, 1: 1.0, 2: 2.0, 3: 1.0}
    for i in (0, 3):  # what the model says already
        cases[i] = replace(cases[i], target_new=cases[i].target_old, target_old=cases[i].target_new)
    measurement.take_reference(bundled, cases)
    found = evaluator.evaluate(bundled, cases, weights, 11, [measurement], lambda: Measured({}), 1)
    plain = measurement.measure(bundled, cases)
    names = {"edit/counterfact": ("efficacy_score", "generalization_score", "locality_score", "harmonic_score")}
    *kinds, harmonic = names.get(measurement.name, ("efficacy", "generalization", "specificity", "harmonic"))
    means = [sum(weights[row["case"]] * row[kind] for row in plain.cases) / 11 for kind in kinds]
    assert [found[f"{measurement.name}/{kind}"] for kind in kinds] == pytest.approx(means)
    assert means != pytest.approx([plain.scores[kind] for kind in kinds])
    assert found[f"{measurement.name}/{harmonic}"] == pytest.approx(3 / sum(1 / mean for mean in means))


def test_the_full_stop_of_every_sentence_is_a_word():
    """As for nltk.word_tokenize: "One two . Three four 3.5 ." has six bigrams and five trigrams, each once."""
    expected = (2 / 3 * math.log2(6) + 4 / 3 * math.log2(5)) / 2
    assert ngram_entropy("One two. Three four 3.5.") == pytest.approx(expected, abs=1e-12)


def test_fluency_and_consistency(cases, bundled):
    metric = GenerationScore(tfidf_vectorizer(["the king of the north", "a town in the south"]))
    metric.update(["the king of the north"], 0, ["the king of the north"])
    metric.update(["so so so so so", "so so so so so"], 1)
    result = metric.compute()
    assert float(result["consistency"]) == pytest.approx(100)
    assert float(result["fluency"]) == pytest.approx(100 * (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2 / 2)
    measurement = GenerationQuality(max_tokens=30, max_cases=2)
    measurement.take_reference(bundled, cases)
    first, second = (measurement.measure(bundled, cases) for _ in range(2))
    assert first == second
    assert [row["case"] for row in first.cases] == [0, 3]
    assert all(
        text.startswith(prompt)
        for row in first.cases
        for text, prompt in zip(row["texts"], cases[0].generation_prompts, strict=True)
    )
    assert all(len(bundled.tokens.encode(text)) <= 31 for row in first.cases for text in row["texts"])
    alone = measurement.measure(bundled, {3: cases[3]})
    assert alone.cases[0] == first.cases[1]
    other = GenerationQuality(max_tokens=30, max_cases=2, seed=1)
    other.take_reference(bundled, cases)
    assert other.measure(bundled, cases).cases[0]["texts"] != first.cases[0]["texts"]


def test_generation_says_what_it_lacks(cases, bundled, monkeypatch):
    silent = {i: replace(r, generation_prompts=()) for i, r in cases.items()}
    with pytest.raises(UserError, match="generation_prompts"):
        GenerationQuality().check(bundled, list(silent.values()))
    plain = {i: replace(r, references=()) for i, r in cases.items()}
    measurement = GenerationQuality(max_tokens=20, max_cases=1)
    measurement.take_reference(bundled, plain)
    assert sorted(measurement.measure(bundled, plain).scores) == ["fluency"]
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("nltk", "sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"prune-lightning\[eval\]"):
        GenerationQuality()
    assert not GenerationQuality(enabled=False).enabled
    with pytest.raises(UserError, match="scikit-learn"):
        tfidf_vectorizer(["a"])


def test_samples_are_spread_over_the_stream():
    assert spread(range(101), 3) == [0, 50, 100]
    assert spread([4], 3) == [4]
    assert spread(range(5), 1) == [0]


def test_token_match_micro_and_macro():
    metric = TokenMatch(["a", "b"], harmonic=True)
    metric.update(
        "a", torch.tensor([1, 4]), torch.tensor([2, 4]), torch.tensor([0, 1]), nonfinite=torch.tensor([True, False])
    )
    result = {name: float(value) for name, value in metric.compute().items()}
    assert (result["a"], result["a_micro"], result["num_nonfinite"]) == (0.75, pytest.approx(5 / 6), 1)
    assert math.isnan(result["harmonic"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records are not here")
@pytest.mark.parametrize(("reader", "file"), [(CounterFact, "counterfact_2000.json"), (ZsRE, "zsre_1000.json")])
def test_real_records_are_scored(bundled_shared, reader, file):
    stream = reader(path=str(SHARED / "data" / file), num_edits=3, bad_rows="skip")
    stream.setup()
    real = dict(enumerate(stream.requests))
    expected = {"locality_acc": 1.0, "bare_locality": 1.0, "num_nonfinite": 0.0}
    for measurement in (
        CounterFactScores(),
        ZsREScores(),
        EasyEditScores(),
        WildGeneration(("bare",), max_new_tokens=5),
    ):
        measurement.take_reference(bundled_shared, real)
        measured = measurement.measure(bundled_shared, real)
        assert len(measured.cases) == 3
        for name, score in measured.scores.items():
            if name in expected:
                assert score == expected[name]
            elif not name.startswith("num_") and "magnitude" not in name and score == score:
                assert 0 <= score <= 1
