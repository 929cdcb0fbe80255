"""Free answers: against a plain loop, whatever the batch; stops, contexts, judges, locality."""

from __future__ import annotations

import warnings

import pytest
import torch

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.evaluation.decoding import TopK, decode
from prune_lightning.evaluation.judging import judge_prompt, verdict
from prune_lightning.evaluation.wild import INSTRUCTION, WildGeneration
from prune_lightning.metrics.functional import contains, exact_match, normalise_answer
from prune_lightning.types import EditRequest, Probe

PROMPTS = [
    "The capital of Japan is",
    "Seven plus two equals",
    "By profession, Claude Monet was a",
    "The old king walked to",
]
JAPAN = EditRequest(
    case_id=0,
    subject="Japan",
    prompt="The capital of Japan is",
    target_new="the Tokyo",
    paraphrases=("Seven plus two equals",),
    locality=(Probe("By profession, Claude Monet was a", None), Probe("The old king walked to", None)),
    portability=(Probe("The capital of Japan is", "Edo", aliases=("TOKYO",)), Probe("Seven plus two equals", "ten")),
)
TEMPLATE = (
    "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Reply:{% endif %}"
)


@torch.no_grad()
def plain_greedy(model, ids, limit, stops):
    """One token after another, the whole row run every time, until a stop text, the end token or the limit."""
    new = []
    while len(new) < limit:
        logits = model.model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        new.append(int(logits.argmax()))
        text = model.tokens.tokenizer.decode(new, skip_special_tokens=True)
        if new[-1] == model.tokens.tokenizer.eos_token_id:
            return new[:-1], text
        for stop in stops:
            if stop in text:
                return new, text[: text.index(stop) + len(stop)]
    return new, text


@pytest.mark.parametrize("stops", [(".", "\n"), ("\n",), ()])
def test_answers_are_those_of_a_plain_loop_whatever_the_batch(bundled_shared, stops):
    prompts = bundled_shared.tokens.encode_all(PROMPTS)
    limits = [9, 3, 14, 12]
    expected = [plain_greedy(bundled_shared, ids, n, stops) for ids, n in zip(prompts, limits, strict=True)]
    for budget in (1, 10_000):
        got = decode(bundled_shared, prompts, limits, stops, token_budget=budget)
        assert [(list(c.ids), c.text) for c in got] == expected
        assert all(c.finite for c in got)
    assert len({len(c.ids) for c in got}) > 1  # the rows do not end together


def test_wishes_of_the_checkpoint_are_set_aside(bundled):
    prompts = bundled.tokens.encode_all(PROMPTS)
    expected = decode(bundled, prompts, [12] * 4)
    own = bundled.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 9.0
    assert decode(bundled, prompts, [12] * 4) == expected
    assert bundled.model.generation_config is own


def test_end_tokens_end_an_answer(bundled):
    plain = decode(bundled, bundled.tokens.encode_all(PROMPTS[:1]), [12])[0]
    bundled.model.generation_config.eos_token_id = [plain.ids[1], 0]
    assert decode(bundled, bundled.tokens.encode_all(PROMPTS[:1]), [12])[0].ids == plain.ids[:1]


def test_long_prompts_leave_room(bundled_shared):
    limit = 20
    long = bundled_shared.tokens.encode("word " * 600)
    got = decode(bundled_shared, [long], [limit])[0]
    room = bundled_shared.tokens.max_length - limit
    assert list(got.ids) == plain_greedy(bundled_shared, long[-room:], limit, ())[0]
    with pytest.raises(UserError, match="leave no room"):
        decode(bundled_shared, [long], [bundled_shared.tokens.max_length])


def test_draws_follow_the_model_and_not_the_batch(bundled_shared):
    ids, k, draws = bundled_shared.tokens.encode("The old king walked to"), 3, 600
    seeds = list(range(draws))
    drawn = [c.ids[0] for c in decode(bundled_shared, [ids] * draws, [1] * draws, sampling=TopK(k, seeds))]
    with torch.no_grad():
        top = bundled_shared.model(input_ids=torch.tensor([ids])).logits[0, -1].topk(k)
    for token, share in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
        assert drawn.count(token) / draws == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5 + 1e-9)
    prompts = bundled_shared.tokens.encode_all(PROMPTS)
    together = decode(bundled_shared, prompts, [8] * 4, sampling=TopK(5, [1, 2, 3, 4]))
    assert decode(bundled_shared, prompts[2:3], [8], sampling=TopK(5, [3]))[0] == together[2]


def test_normalised_answers():
    assert normalise_answer("The U.S.  of an Apple!") == "us of apple"
    assert exact_match("  an Apple.\n", ["apple"])
    assert not exact_match("", ["the"])
    assert not exact_match("apple pie", ["apple"])
    assert contains("He ate an apple, then slept", ["Apple"])
    assert not contains("pineapple", ["apple"])
    assert not contains("whatever", ["the"])


def test_scores_of_generated_answers(bundled_shared):
    measurement = WildGeneration(("bare", "instruction"))
    measurement.take_reference(bundled_shared, {0: JAPAN})
    measured = measurement.measure(bundled_shared, {0: JAPAN})
    scores = measured.scores
    assert scores["bare_efficacy_exact_match"] == scores["bare_efficacy_contains"] == 1  # articles do not count
    assert scores["bare_generalization_exact_match"] == 0
    assert scores["bare_portability_exact_match"] == 0.5  # by its alias
    assert scores["bare_locality"] == scores["instruction_locality"] == 1
    (row,) = measured.cases
    assert {name for name in row if name in scores} == {name for name in scores if not name.startswith("num_")}
    said = [g for g in row["generations"] if (g["context"], g["kind"]) == ("bare", "efficacy")]
    assert said == [
        {
            "context": "bare",
            "kind": "efficacy",
            "prompt": JAPAN.prompt,
            "answers": ["the Tokyo"],
            "generated": " Tokyo.",
        }
    ]
    instruction = INSTRUCTION.format(JAPAN.prompt)
    ids = bundled_shared.tokens.encode(instruction)
    expected = plain_greedy(bundled_shared, ids, 50, (".", "\n"))[1]
    assert next(g["generated"] for g in row["generations"] if g["context"] == "instruction") == expected


def test_locality_needs_the_unedited_model_and_sees_changes(bundled):
    stream = BundledWorld(num_edits=4)
    stream.setup()
    cases = dict(enumerate(stream.requests))
    measurement = WildGeneration(("bare",))
    with pytest.raises(UserError, match="take_reference"):
        measurement.measure(bundled, cases)
    measurement.take_reference(bundled, cases)
    probes = {(i, p.prompt): p for i, r in cases.items() for p in r.locality}
    before = {key: plain_greedy(bundled, bundled.tokens.encode(key[1]), 50, (".", "\n"))[0] for key in probes}
    with torch.no_grad():
        weight = bundled.rewrite_module(1).weight
        weight += 4 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    after = {key: plain_greedy(bundled, bundled.tokens.encode(key[1]), 50, (".", "\n"))[0] for key in probes}
    same = [[before[i, p.prompt] == after[i, p.prompt] for p in r.locality] for i, r in cases.items()]
    expected = sum(sum(case) / len(case) for case in same) / len(same)
    assert 0 < expected < 1
    assert measurement.measure(bundled, cases).scores["bare_locality"] == pytest.approx(expected)


def test_chat_needs_a_template(bundled):
    measurement = WildGeneration(("bare", "chat"))
    with pytest.warns(UserWarning, match="no chat template"):
        measurement.take_reference(bundled, {0: JAPAN})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("chat" in name for name in measurement.measure(bundled, {0: JAPAN}).scores)
    bundled.tokens.tokenizer.chat_template = TEMPLATE
    measurement = WildGeneration(("chat",))
    measurement.take_reference(bundled, {0: JAPAN})
    row = measurement.measure(bundled, {0: JAPAN}).cases[0]
    ids = bundled.tokens.tokenizer(f"User: {JAPAN.prompt}\nReply:", add_special_tokens=False)["input_ids"]
    assert row["generations"][0]["generated"] == plain_greedy(bundled, ids, 50, (".", "\n"))[1]
    with pytest.raises(UserError, match="did you mean 'chat'"):
        WildGeneration(("chatt",))


def test_a_judge_is_asked_once_for_all_and_its_silence_counted(bundled_shared):
    asked = []

    def judge(prompts):
        asked.append(list(prompts))
        return ["A, of course" if "Target: the Tokyo\nAnswer: Tokyo\n" in p else "hm" for p in prompts]

    measurement = WildGeneration(("bare",), judge=judge)
    measurement.take_reference(bundled_shared, {0: JAPAN})
    measured = measurement.measure(bundled_shared, {0: JAPAN})
    assert len(asked) == 1
    assert measured.scores["bare_efficacy_judge"] == 1
    assert measured.scores["bare_generalization_judge"] == 0
    assert measured.scores["num_unparsable"] == 3
    assert measured.cases[0]["generations"][0]["reply"] == "A, of course"
    assert (verdict("B"), verdict("a)"), verdict("")) == (False, True, None)
    assert judge_prompt("q", "t", " It is. ").count("Answer: It is\n") == 1
    with pytest.raises(UserError, match="0 replies to 4"):
        WildGeneration(("bare",), judge=lambda prompts: []).measure(bundled_shared, {0: JAPAN})
