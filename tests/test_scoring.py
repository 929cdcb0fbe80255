from __future__ import annotations

import math

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from prune_lightning import devices
from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import decode
from prune_lightning.evaluation.generation import GenerationQuality
from prune_lightning.evaluation.scoring import greedy_continuations, score_encoded, score_pairs, token_nll
from prune_lightning.metrics import CorpusPerplexity, CounterFactScore, ExactMatch
from prune_lightning.metrics.functional import retention
from prune_lightning.models import batching
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.token_tree import grow
from prune_lightning.models.tokenization import EncodedPair, Tokens
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


def test_perplexity_takes_small_batches_of_a_large_vocabulary(bundled_shared, monkeypatch):
    """The logits at all tokens are in memory at once, so that their number is bounded, not that of the tokens."""
    texts = ["The old king walked to the river.", "In the morning they ate.", "A long day ended at last in the town."]
    expected, _ = token_nll(bundled_shared, texts)
    for text, nll in zip(texts, expected, strict=True):
        ids = torch.tensor([bundled_shared.tokens.encode(text)])
        log_p = bundled_shared.model(ids).logits[0, :-1].double().log_softmax(-1)
        assert float(nll) == pytest.approx(-float(log_p.gather(1, ids[0, 1:, None]).sum()), rel=1e-5)
    rows = []
    handle = bundled_shared.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(batching, "LOGITS", 8 * bundled_shared.config.vocab_size)
    again, _ = token_nll(bundled_shared, texts)
    handle.remove()
    assert rows == [1, 1, 1]
    assert torch.allclose(again, expected, rtol=1e-5)
    assert batching.within_logits(8192, 10**9) == 1


class Sums(TorchDispatchMode):
    """Collects the sizes of what `logsumexp` copies."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.logsumexp.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_long_targets_are_held_of_some_rows_at_a_time(bundled_shared, monkeypatch, shared):
    """Of a vocabulary of 49,152, those at all tokens of a batch and the copy of their sum would take 3 GB."""
    model, size = bundled_shared, bundled_shared.config.vocab_size
    words = ["river", "king", "queen", "market", "town", "morning"]
    pairs = [
        (f"The old {a} walked to", f"the {b} and the {c} forgot the {a} in the {b} until the long day ended at last.")
        for a in words for b in words for c in words[:2]
    ]  # fmt: skip
    encoded = model.tokens.encode_pairs(pairs)
    monkeypatch.setattr(devices, "_IN_CACHE", 2**30)
    with Sums() as whole:
        expected = score_encoded(model, encoded, trees=shared)
    assert max(whole.sizes) > 512 * size
    held = []
    handle = model.model.get_output_embeddings().register_forward_hook(lambda *seen: held.append(seen[2].numel()))
    monkeypatch.setattr(batching, "LOGITS", 256 * size)
    monkeypatch.setattr(devices, "_IN_CACHE", 16 * size)
    with Sums() as bounded:
        found = score_encoded(model, encoded, trees=shared)
    handle.remove()
    assert 128 * size < max(held) <= 256 * size
    assert max(bounded.sizes) == 16 * size
    assert torch.equal(found.predicted, expected.predicted)
    assert torch.equal(found.num_hits, expected.num_hits)
    assert torch.allclose(found.nll, expected.nll, rtol=1e-5)


def test_nan_model_fails_every_score(bundled):
    with torch.no_grad():
        bundled.rewrite_module(1).weight.fill_(float("nan"))
    scores = score_pairs(bundled, PAIRS)
    assert not scores.hit.any()
    metric = CounterFactScore()
    metric.update("efficacy", scores.nll, scores.nll, scores.hit, torch.arange(len(PAIRS)))
    assert float(metric.compute()["efficacy_score"]) == 0.0
    assert int(metric.compute()["num_nonfinite"]) == len(PAIRS)
    assert retention({"a": float("nan")}, {"a": 0.9}, {"a": 0.25}) == 0.0


def test_a_pair_whose_last_token_is_not_finite_has_no_hits(bundled_shared):
    tokens, prompt = bundled_shared.tokens, "The capital of Japan is"
    ids = tokens.encode(prompt)
    pair = EncodedPair([*ids, *decode(bundled_shared, [ids], [2])[0].ids], len(ids))
    assert score_encoded(bundled_shared, [pair]).num_hits.tolist() == [2]

    def broken(module, args, output):
        return output.index_fill(0, torch.tensor([1]), math.nan)

    handle = bundled_shared.model.get_output_embeddings().register_forward_hook(broken)
    found = score_encoded(bundled_shared, [pair])
    handle.remove()
    assert found.nonfinite.tolist() == [True]
    assert (found.num_hits.tolist(), found.predicted.tolist()) == ([0], [[-1, -1]])


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
        ({"paraphrases": ("",)}, "non-empty text"),
    ],
)
def test_bad_requests_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        EditRequest(**({"case_id": 0, "subject": "Ann", "prompt": "Ann is", "target_new": "old"} | kwargs))


SHARING = [
    ("The capital of Japan is", "Tokyo."),
    ("The capital of Japan is", "Kyoto, a city"),
    ("The capital of Kenya is", "Nairobi"),
    ("The capital of Kenya is the", "shilling."),
    ("Seven plus two equals", "nine."),
    ("Seven plus two equals", "eleven and more"),
    ("Seven", "plus two"),
]
STYLES = ("gpt2", "llama-2", "llama-3")


def break_token(model, token):
    """Let a token's hidden state be NaN, as where a text overflows in 16 bits."""
    model.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill((args[0] == token)[..., None], math.nan)
    )


def test_a_text_that_breaks_leaves_the_others_of_its_row_alone(tiny):
    model = tiny("llama")
    encoded = model.tokens.encode_pairs(SHARING)
    prompts = [pair.ids[: pair.target_start] for pair in encoded]
    only = {token for ids in prompts if ids is not prompts[3] for token in ids}
    before, said = score_encoded(model, encoded), decode(model, prompts, [4] * len(prompts))
    break_token(model, next(token for token in prompts[3] if token not in only))
    scores, now = score_encoded(model, encoded), decode(model, prompts, [4] * len(prompts))
    others = torch.arange(len(encoded)) != 3
    assert scores.nonfinite.tolist() == (~others).tolist()
    assert torch.allclose(scores.nll[others], before.nll[others], rtol=1e-6)
    assert scores.num_hits[others].tolist() == before.num_hits[others].tolist()
    assert [one.finite for one in now] == others.tolist()
    assert [a.ids for a, other in zip(now, others, strict=True) if other] == [
        b.ids for b, other in zip(said, others, strict=True) if other
    ]


def styled(style):
    """A small tokenizer of a style: byte-level without BOS, SentencePiece with BOS, byte-level with BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if style == "llama-2" else None))
    initial = ["<s>", "</s>", "<unk>"]
    if style == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [f"{prompt} {target}" for prompt, target in SHARING + PAIRS] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=initial, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator([word for text in texts for word in text.split()] + texts[:2], trainer)
    if style != "gpt2":
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("style", STYLES)
def test_the_words_of_a_generated_text_stay_apart(tiny, style):
    """A SentencePiece tokenizer decodes a continuation by itself without the blank at its beginning."""
    tokenizer, family = styled(style), "gpt2" if style == "gpt2" else "llama"
    model = LanguageModel(tiny(family, torch.float32).model, tokenizer)
    (word,) = model.tokens.encode_pair("Seven plus two equals", "a").target
    head = model.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, output: output.index_fill(-1, torch.tensor([word]), 1e6))
    request = EditRequest(0, "Japan", "Japan is", "a", generation_prompts=("The capital of Japan is",))
    measurement = GenerationQuality(max_tokens=len(model.tokens.encode("The capital of Japan is")) + 3)
    measurement.take_reference(model, {0: request})
    ((text,),) = [row["texts"] for row in measurement.measure(model, {0: request}).cases]
    handle.remove()
    assert text == "The capital of Japan is a a a"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("style", STYLES)
def test_scores_know_no_tokenizer_style_padding_or_batch(tiny, style, side):
    model = tiny("gpt2" if style == "gpt2" else "llama", torch.float32)
    tokenizer = styled(style)
    tokenizer.padding_side = side
    model = LanguageModel(model.model, tokenizer, model.family)
    encoded = model.tokens.encode_pairs(SHARING)
    for (prompt, target), pair in zip(SHARING, encoded, strict=True):
        assert pair.ids.count(tokenizer.bos_token_id) == (style != "gpt2")
        assert tokenizer.decode(pair.target).strip() == target
        assert tokenizer.decode(pair.ids[: pair.target_start], skip_special_tokens=True).strip() == prompt
    expected = torch.tensor([naive_nll(model, *pair) for pair in SHARING])
    for budget in (1, 60, 10_000):
        for trees in (False, True):
            scores = score_encoded(model, encoded, budget, trees)
            assert torch.allclose(scores.nll, expected, atol=1e-5)

    # Padded on the other side by hand: positions come from the mask.
    longest = max(len(pair.ids) for pair in encoded)
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(p.ids)) + p.ids for p in encoded])
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in encoded])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1)
    by_hand = torch.stack([losses[i, -len(p.target) :].mean() for i, p in enumerate(encoded)])
    assert torch.allclose(by_hand, expected, atol=1e-5)

    prompts = model.tokens.encode_all([prompt for prompt, _ in SHARING])
    alone, together = (decode(model, prompts, [6] * len(prompts), token_budget=budget) for budget in (1, 10_000))
    assert alone == together
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("family", sorted(path.stem for path in (ROOT / "configs" / "model" / "family").glob("*.yaml")))
def test_shared_beginnings_change_nothing(tiny, family):
    model = tiny(family)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    encoded = model.tokens.encode_pairs(SHARING)
    shares = family not in ("bloom", "mpt")  # their positions are distances, which a shared beginning would change
    assert model.tree_depth >= max(len(pair.ids) for pair in encoded) if shares else model.tree_depth == 0
    seen.clear()
    shared = score_encoded(model, encoded)
    assert not shares or sum(seen) < 0.8 * sum(len(pair.ids) - 1 for pair in encoded)
    alone = [score_encoded(model, [pair], trees=False) for pair in encoded]
    tolerance = 1e-10 if family in ("gpt2", "gpt_neox") else 1e-6  # elsewhere norms or attention run in fp32
    assert torch.allclose(shared.nll, torch.cat([one.nll for one in alone]), atol=tolerance, rtol=0)
    assert shared.nll.dtype == torch.float64
    assert shared.num_hits.tolist() == [int(one.num_hits) for one in alone]
    assert [row[: len(p.target)].tolist() for row, p in zip(shared.predicted, encoded, strict=True)] == [
        one.predicted[0].tolist() for one in alone
    ]
    single = tiny(family, torch.float32)
    expected = torch.cat([score_encoded(single, [pair], trees=False).nll for pair in encoded])
    assert torch.allclose(score_encoded(single, encoded).nll, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_ignores_the_mask_gets_plain_rows(tiny):
    model = tiny("gpt2")
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "attention_mask"}),
        with_kwargs=True,
    )
    assert model.tree_depth == 0


def test_trees_hold_every_sequence_once():
    sequences = [[1, 2, 3], [1, 2], [4], [1, 2, 5, 6], [1, 2, 3]]
    (row,) = grow(sequences)
    assert len(row.ids) == 6
    for index, sequence in enumerate(sequences):
        assert [row.ids[node] for node in row.paths[index]] == sequence
        assert [row.depth[node] for node in row.paths[index]] == list(range(len(sequence)))
    sees = row.sees(8)
    for path in row.paths.values():
        assert sees[path[-1]].nonzero()[0].tolist() == sorted(path)
    rows = grow(sequences, length=4)
    assert sorted(index for one in rows for index in one.paths) == list(range(5))
    assert all(len(one.ids) <= 4 for one in rows)
    level = grow([[token] * 3 for token in range(6)], length=12)
    assert [len(one.ids) for one in level] == [9, 9], "two rows are needed, and neither is padded to the other"


def test_a_model_that_stays_as_it_is_scores_a_pair_once(tiny):
    model = tiny("llama")
    ran = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    first, second = SHARING[:3], [SHARING[5], SHARING[2], SHARING[2], SHARING[0]]
    alone = [score_pairs(model, pairs) for pairs in (first, second)]
    with model.kept.while_unchanged():
        for pairs, expected in zip((first, second), alone, strict=True):
            with model.kept.while_unchanged():
                kept = score_pairs(model, pairs)
            assert torch.allclose(kept.nll, expected.nll, atol=1e-12, rtol=0)
            width = expected.predicted.shape[1]
            assert torch.equal(kept.predicted[:, :width], expected.predicted)
            assert (kept.predicted[:, width:] == -1).all()
        ran.clear()
        again = score_pairs(model, [*first, *second])
        assert not ran
        assert torch.equal(again.num_hits, torch.cat([one.num_hits for one in alone]))
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(2)
    assert not torch.allclose(score_pairs(model, first).nll, alone[0].nll, atol=1e-3)


def test_retokenised_pairs_are_counted(tiny):
    words = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "c": 3, " b": 4, "a b": 5}, [(" ", "b"), ("a", " b")]))
    model = tiny("gpt2")
    model = LanguageModel(model.model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="c"), model.family)
    merged = model.tokens.encode_pair("c a", "b")
    assert (merged.ids, merged.target, merged.retokenised) == ([3, 2, 5], [5], True)
    scores = score_pairs(model, [("c a", "b"), ("c", "a")])
    assert scores.num_retokenised == 1
    assert float(scores.nll[0]) == pytest.approx(naive_nll(model, "c a", "b"), rel=1e-6)
    assert model.tokens.encode_pair("a", "b c").target_start == 1  # nothing predicts the first token


def test_match_is_the_share_of_tokens(bundled_shared):
    scores = score_pairs(bundled_shared, PAIRS)
    for i, (prompt, target) in enumerate(PAIRS):
        pair = bundled_shared.tokens.encode_pair(prompt, target)
        choice = bundled_shared.model(input_ids=torch.tensor([pair.ids])).logits[0].argmax(-1).tolist()
        said = choice[pair.target_start - 1 : -1]
        hits = [a == b for a, b in zip(said, pair.target, strict=True)]
        assert float(scores.match[i]) == pytest.approx(sum(hits) / len(hits))
        assert bool(scores.hit[i]) == all(hits)
        assert scores.predicted[i, : len(said)].tolist() == said
