from __future__ import annotations

import math

import pytest
import torch

from prune_lightning.errors import UserError
from prune_lightning.evaluation.scoring import greedy_continuations, score_pairs, token_nll
from prune_lightning.metrics import CorpusPerplexity, CounterFactScore, ExactMatch
from prune_lightning.metrics.functional import retention
from prune_lightning.models.tokenization import Tokens
from prune_lightning.types import EditRequest

PAIRS = [
    ("The capital of Japan is", "Tokyo."),
    ("By profession, Claude Monet was a", "painter."),
    ("The currency of Kenya is the", "shilling."),
    ("Seven plus two equals", "nine."),
    ("The mother tongue of Marie Curie was", "Russian"),
]


def naive_nll(model, prompt, target):
    """One row at a time, whole vocabulary, no padding."""
    pair = model.tokens.encode_pair(prompt, target)
    logits = model.model(input_ids=torch.tensor([pair.ids])).logits[0].double().log_softmax(-1)
    picked = [-logits[i - 1, pair.ids[i]] for i in range(pair.target_start, len(pair.ids))]
    return float(sum(picked) / len(picked))


def test_scores_equal_naive_scoring_whatever_the_batch(bundled_shared):
    expected = torch.tensor([naive_nll(bundled_shared, *pair) for pair in PAIRS])
    for budget in (1, 40, 10_000):
        scores = score_pairs(bundled_shared, PAIRS, token_budget=budget)
        assert torch.allclose(scores.nll.double(), expected.double(), atol=1e-5)
    order = [3, 0, 4, 1, 2, 0]
    shuffled = score_pairs(bundled_shared, [PAIRS[i] for i in order])
    assert torch.allclose(shuffled.nll.double(), expected[order].double(), atol=1e-5)


def test_hit_is_what_greedy_decoding_says(bundled_shared):
    hits = score_pairs(bundled_shared, PAIRS).hit
    texts = greedy_continuations(bundled_shared, [prompt for prompt, _ in PAIRS], max_new_tokens=12, stop=".")
    said = [text.startswith(target) for text, (_, target) in zip(texts, PAIRS, strict=True)]
    assert hits.tolist() == said
    assert True in said
    assert False in said


def test_perplexity_equals_the_models_own_loss(bundled_shared):
    text = "The old king walked to the river in the morning and the queen forgot the market."
    ids = torch.tensor([bundled_shared.tokens.encode(text)])
    loss = float(bundled_shared.model(input_ids=ids, labels=ids).loss)
    metric = CorpusPerplexity()
    metric.update(*token_nll(bundled_shared, [text]))
    assert float(metric.compute()) == pytest.approx(math.exp(loss), rel=1e-5)


def test_nan_model_fails_every_score(bundled):
    with torch.no_grad():
        bundled.rewrite_module(1).weight.fill_(float("nan"))
    scores = score_pairs(bundled, PAIRS)
    assert not scores.hit.any()
    metric = CounterFactScore()
    metric.update("efficacy", scores.nll, scores.nll, scores.hit, torch.arange(len(PAIRS)))
    assert float(metric.compute()["efficacy_score"]) == 0.0
    assert int(metric.compute()["num_nonfinite"]) == len(PAIRS)
    assert retention({"a": float("nan")}, {"a": 0.9}) == 0.0


def test_editing_score_by_hand():
    metric = CounterFactScore()
    metric.update(
        "generalization",
        nll_wanted=torch.tensor([1.0, 3.0, 1.0]),
        nll_other=torch.tensor([2.0, 2.0, 1.0]),  # better, worse, tie
        hit=torch.tensor([True, False, True]),
        case=torch.tensor([0, 0, 1]),
    )
    metric.update("efficacy", torch.tensor([1.0]), None, torch.tensor([True]), torch.tensor([0]))
    result = {name: float(value) for name, value in metric.compute().items()}
    assert result["generalization_score"] == pytest.approx((0.5 + 0.0) / 2)
    assert result["generalization_accuracy"] == pytest.approx((0.5 + 1.0) / 2)
    assert result["efficacy_accuracy"] == 1.0
    assert math.isnan(result["efficacy_score"])
    assert math.isnan(result["locality_score"])
    with pytest.raises(UserError, match="did you mean 'locality'"):
        metric.update("localty", torch.ones(1), None, torch.ones(1), torch.zeros(1))


def test_metrics_add_up_over_updates():
    parts, whole = ExactMatch(), ExactMatch()
    hits = torch.tensor([True, False, True, True, False])
    parts.update(hits[:2])
    parts.update(hits[2:])
    whole.update(hits)
    assert parts.compute() == whole.compute() == pytest.approx(0.6)


def test_target_is_what_follows_the_prompt(bundled_shared):
    pair = bundled_shared.tokens.encode_pair("The capital of Japan is ", "Tokyo.")
    assert bundled_shared.tokens.decode(pair.target) == " Tokyo."
    assert pair.ids[0] == bundled_shared.tokens.tokenizer.bos_token_id
    assert pair.ids[: pair.target_start] == bundled_shared.tokens.encode("The capital of Japan is")


def test_subject_position_is_that_of_its_last_character(bundled_shared):
    tokens = bundled_shared.tokens
    for text, subject in [
        ("By profession, Claude Monet was a", "Claude Monet"),
        ("In Zürich Renée Müller ate", "Renée Müller"),
        ("A 💡 and Ö", "Ö"),
    ]:
        end = text.index(subject) + len(subject)
        index = tokens.subject_last(text, end)
        ids = tokens.tokenizer(text)["input_ids"]
        assert tokens.decode(ids[: index + 1]).endswith(subject[-1])
        assert not tokens.decode(ids[:index]).endswith(subject)


def test_long_prompts_lose_their_beginning(bundled_shared):
    short = Tokens(bundled_shared.tokens.tokenizer, max_length=12)
    pair = short.encode_pair("word " * 50, "Tokyo.")
    assert len(pair.ids) == 12
    assert short.decode(pair.target) == " Tokyo."
    assert pair.dropped > 0
    with pytest.raises(UserError, match="longer than the model's context"):
        short.encode_pair("a", "word " * 50)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"subject": "Bob"}, "not in its prompt"),
        ({"target_new": " "}, "non-empty"),
        ({"prompt": ""}, "non-empty"),
        ({"paraphrases": ("",)}, "non-empty texts"),
    ],
)
def test_bad_requests_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        EditRequest(**({"case_id": 0, "subject": "Ann", "prompt": "Ann is", "target_new": "old"} | kwargs))
