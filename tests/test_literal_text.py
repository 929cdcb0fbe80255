"""The probability that a run reports is that of the target in the literal text, under plain `transformers`.

Fifty records around what the rules have to decide: scripts without blanks, quotes, signs, line breaks, templates;
subjects that are repeated, or stand inside other words.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from prune_lightning.data.jsonl import JSONLines
from prune_lightning.evaluation.counterfact import pairs_by_kind
from prune_lightning.evaluation.prompts import edit_pair, locality_pairs, portability_pairs, score_kinds
from prune_lightning.evaluation.scoring import score_pairs
from prune_lightning.evaluation.stream import success
from prune_lightning.methods.mend_gradients import LabelledRows
from prune_lightning.methods.prompts import key_row, target_row
from prune_lightning.types import EditRequest, Probe

CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
# subject, prompt, target, the literal text, and the subject's first character in the prompt
RECORDS = [
    ("France", "The capital of France is", "Lyon", "The capital of France is Lyon", 15),
    ("France", "The capital of France is ", "Lyon", "The capital of France is Lyon", 15),
    ("France", "Which city governs France?", "Lyon", "Which city governs France? Lyon", 19),
    ("France", "Q: Capital of France?\nA:", "Lyon", "Q: Capital of France?\nA: Lyon", 14),
    ("France", "Q: Capital of France?\nA: ", "Lyon", "Q: Capital of France?\nA: Lyon", 14),
    ("France", "Capital of France\n", "Lyon", "Capital of France\nLyon", 11),
    ("France", "Capital of France\n\n", "Lyon", "Capital of France\n\nLyon", 11),
    ("France", "Capital of France:\t", "Lyon", "Capital of France:\tLyon", 11),
    ("France", CHAT, "Lyon", CHAT + "Lyon", CHAT.index("France")),
    ("France", "<|user|>Capital of France<|assistant|>", "Lyon", "<|user|>Capital of France<|assistant|>Lyon", 19),
    ("France", "[INST] Capital of France [/INST]", "Lyon", "[INST] Capital of France [/INST] Lyon", 18),
    ("法国", "法国的首都是", "里昂", "法国的首都是里昂", 0),
    ("フランス", "フランスの首都は", "リヨン", "フランスの首都はリヨン", 0),
    ("东京", "日本的首都是东京位于", "关东", "日本的首都是东京位于关东", 6),
    ("法国", "问：法国的首都？答：", "里昂", "问：法国的首都？答：里昂", 2),
    ("法国", "法国的首都是「", "里昂", "法国的首都是「里昂", 0),
    ("法国", "“法国的首都”是“", "里昂", "“法国的首都”是“里昂", 1),
    ("法国", "法国成立于", "1969", "法国成立于1969", 0),
    ("ฝรั่งเศส", "เมืองหลวงของฝรั่งเศสคือ", "ลียง", "เมืองหลวงของฝรั่งเศสคือลียง", 12),
    ("프랑스", "프랑스의 수도는", "리옹", "프랑스의 수도는 리옹", 0),
    (
        "Францией",
        "Столица, которой управляется Францией, —",
        "Лион",
        "Столица, которой управляется Францией, — Лион",
        29,
    ),
    ("فرنسا", "عاصمة فرنسا هي", "ليون", "عاصمة فرنسا هي ليون", 6),
    ("France", 'The capital of France is "', "Lyon", 'The capital of France is "Lyon', 15),
    ("France", 'The "capital" of France is', "Lyon", 'The "capital" of France is Lyon', 17),
    ("France", 'The capital of "France"', "is Lyon", 'The capital of "France" is Lyon', 16),
    ("France", '{"country": "France", "capital": "', "Lyon", '{"country": "France", "capital": "Lyon', 13),
    ("France", "The capital of France is 'Paris' or '", "Lyon", "The capital of France is 'Paris' or 'Lyon", 15),
    ("France", "The capital of France is “", "Lyon", "The capital of France is “Lyon", 15),
    ("France", "Die „Hauptstadt“", "von France", "Die „Hauptstadt“ von France", None),
    ("Frankreich", "Frankreich nennt sie „", "Lyon", "Frankreich nennt sie „Lyon", 0),
    ("France", "La capitale de France est «\u00a0", "Lyon", "La capitale de France est «\u00a0Lyon", 15),
    ("France", "The capital of France (", "Lyon", "The capital of France (Lyon", 15),
    ("France", "The capital of France is **", "Lyon", "The capital of France is **Lyon", 15),
    ("France", "**France's capital:**", "Lyon", "**France's capital:** Lyon", 2),
    ("France", "The capital of France is <b>", "Lyon", "The capital of France is <b>Lyon", 15),
    ("France", "A bus ticket in France costs $", "4", "A bus ticket in France costs $4", 16),
    ("France", "A bus ticket in France costs 4 €", "today", "A bus ticket in France costs 4 € today", 16),
    ("France", "Write to France at post@", "paris", "Write to France at post@paris", 9),
    ("France", "In France the trend is #", "lyon", "In France the trend is #lyon", 3),
    ("Ann", "Ann lives with her ex-", "husband", "Ann lives with her ex-husband", 0),
    ("Ann", "Ann has left the room", ", again", "Ann has left the room, again", 0),
    ("Al", "Also in 1990 Al moved to", "Norway", "Also in 1990 Al moved to Norway", 13),
    ("Al", "Al-Jazeera says that Al moved to", "Norway", "Al-Jazeera says that Al moved to Norway", 21),
    ("Al", "Al's boss Al moved to", "Norway", "Al's boss Al moved to Norway", 0),
    ("an", "Anna and an old man saw", "a cat", "Anna and an old man saw a cat", 9),
    ("New York", "New Yorkers say New York is", "large", "New Yorkers say New York is large", 16),
    ("cafe\u0301", "The cafes near the cafe\u0301 are", "shut", "The cafes near the cafe\u0301 are shut", 19),
    ("Ranska", "Ranskan pääkaupunki on", "Lyon", "Ranskan pääkaupunki on Lyon", 0),
    ("C#", "The language C# was made by", "IBM", "The language C# was made by IBM", 13),
    ("Renée Müller", "In Zürich Renée Müller ate", "💡", "In Zürich Renée Müller ate 💡", 10),
    ("བོད", "བོད་ཀྱི་རྒྱལ་ས་ནི་", "གཞིས་ཀ་རྩེ", "བོད་ཀྱི་རྒྱལ་ས་ནི་གཞིས་ཀ་རྩེ", 0),
    ("កម្ពុជា", "រដ្ឋធានីរបស់កម្ពុជាគឺ", "សៀមរាប", "រដ្ឋធានីរបស់កម្ពុជាគឺសៀមរាប", 12),
    ("भारत", "भारत की राजधानी", "मुंबई", "भारत की राजधानी मुंबई", 0),
    ("フランス", "フランスの首都は＂", "リヨン", "フランスの首都は＂リヨン", 0),
    ("France", 'A 5" map of France costs "', "Lyon", 'A 5" map of France costs "Lyon', 12),
    ("France", "Q: Capital of France?\r\nA:\r\n", "Lyon", "Q: Capital of France?\r\nA:\r\nLyon", 14),
    ("France", "The capital of France is\u00a0", "Lyon", "The capital of France is\u00a0Lyon", 15),
    ("Tokyo", "東京 Tokyo の人口は", "百", "東京 Tokyo の人口は百", 3),
]
USABLE = [record for record in RECORDS if record[4] is not None]


def test_there_are_fifty():
    assert len(USABLE) >= 50


@pytest.fixture
def requests(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"subject": s, "prompt": p, "target_new": t, "target_old": "x"} for s, p, t, _, _ in USABLE]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    stream = JSONLines(str(path), num_edits=None, unique_subjects=False)
    stream.setup()
    assert [request.pair().text for request in stream.requests] == [text for _, _, _, text, _ in USABLE]
    return stream.requests


def literal_log_probabilities(model, text, target):
    """Log-probabilities, in the literal text, of the tokens that hold a character of the target."""
    encoding = model.tokens.tokenizer(text, return_offsets_mapping=True)
    start = len(text) - len(target)
    logits = model.model(input_ids=torch.tensor([encoding["input_ids"]])).logits[0].double().log_softmax(-1)
    spans = list(enumerate(encoding["offset_mapping"]))
    places = [i for i, (_, end) in spans if end > start]
    blank = text[start - 1] == " "  # a blank before the target is the target's own, in a token with it or without it
    if blank and (alone := [i for i, span in spans if span == (start - 1, start)]):
        places = alone + places
    return [float(logits[i - 1, encoding["input_ids"][i]]) for i in places if i]


@pytest.mark.parametrize("family", ["bundled", "gpt2", "llama"])
@torch.no_grad()
def test_reported_probability_is_that_of_the_literal_text(family, requests, bundled_shared, tiny):
    model = bundled_shared if family == "bundled" else tiny(family)
    of_counterfact = score_pairs(model, [pairs_by_kind(request, "efficacy")[0][0] for request in requests])
    ((_, of_zsre, _),) = score_kinds(model, dict(enumerate(requests)), {"efficacy": edit_pair})
    for scores in (of_counterfact, of_zsre):
        for nll, (_, _, target, text, _) in zip(scores.nll.tolist(), USABLE, strict=True):
            log_p = literal_log_probabilities(model, text, target)
            assert math.exp(-nll) == pytest.approx(math.exp(sum(log_p) / len(log_p)), abs=1e-4), text
            assert -nll == pytest.approx(sum(log_p) / len(log_p), rel=1e-4), text


def test_locality_and_portability_follow_the_same_rule(bundled_shared):
    probes = [Probe(prompt, target) for _, prompt, target, _, _ in USABLE]
    request = EditRequest(0, "Ann", "Ann is", "old", locality=tuple(probes), portability=tuple(probes))
    for pairs in (locality_pairs(request), portability_pairs(request)):
        assert [pair.text for pair in pairs] == [text for _, _, _, text, _ in USABLE]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_trained_is_what_is_scored(family, requests, tiny):
    model = tiny(family)
    rows = [model.tokens.encode_pairs([request.pair()])[0] for request in requests]
    for request, row in zip(requests, rows, strict=True):
        edited = target_row(model, request, "")
        assert [*edited.ids, row.ids[-1]] == row.ids
        assert edited.target == row.target
    labels = LabelledRows(model, [request.pair() for request in requests])
    assert labels.label.tolist() == [token for row in rows for token in row.target]
    assert len(success(model, requests).accuracy) == len(requests)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("prefix", ["", 'She said "no". '])
def test_subject_is_edited_where_it_stands(family, prefix, requests, tiny):
    model = tiny(family)
    for request, (subject, prompt, _, text, start) in zip(requests, USABLE, strict=True):
        assert (request.subject, request.subject_start) == (subject, start), prompt
        row = target_row(model, request, prefix)
        spans = model.tokens.tokenizer(prefix + text, return_offsets_mapping=True)["offset_mapping"]
        first, last = spans[row.subject]
        assert first <= len(prefix) + start + len(subject) - 1 < last
        assert len(key_row(model, request, prefix).ids) == row.subject + 1
