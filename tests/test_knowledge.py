"""Streams of what a model knows: which records are kept, how they are counted, and that a resumed run keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import BUNDLED
from test_fuzz import command_line

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.data.jsonl import JSONLines
from prune_lightning.errors import UserError
from prune_lightning.evaluation.scoring import greedy_continuations
from prune_lightning.models.loading import load_language_model
from prune_lightning.tasks.knowing import gives_old_answers

NOISE = 2.0  # of 60 facts 30 are left
QUICK = ("evaluation=editing", "callbacks=none", "restraint=none", "progress=false", "method.value.steps=2")


def fitted(model, knows=None, **settings):
    stream = BundledWorld(**settings)
    stream.fit(model.tokens)
    stream.select(knows or (lambda requests: gives_old_answers(model, requests, stream.rule.known_by)))
    return stream


@pytest.fixture(scope="module")
def forgetful():
    """The bundled model with noise in every MLP, so that it knows some facts and not others."""
    model = load_language_model(BUNDLED)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in range(model.num_layers):
            weight = model.rewrite_module(layer).weight
            weight.add_(NOISE * weight.std() * torch.randn_like(weight))
    return model


def said(model, request, tokens):
    """The first tokens of what the model says after a prompt, each by one forward pass over the whole text."""
    ids = model.tokens.encode(request.prompt)
    start = len(ids)
    for _ in range(tokens):
        row = torch.tensor([ids])
        ids = [*ids, int(model(row, torch.ones_like(row))[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("known_by", ["exact_match", "first_token"])
def test_known_is_what_the_model_says_token_by_token(forgetful, known_by):
    stream = BundledWorld(num_edits=60)
    stream.setup()
    expected = []
    for request in stream.requests:
        target = forgetful.tokens.encode_pair(request.prompt, request.target_old).target
        count = len(target) if known_by == "exact_match" else 1
        expected.append(said(forgetful, request, count) == target[:count])
    assert 10 < sum(expected) < 50, "the test needs both kinds"
    assert gives_old_answers(forgetful, stream.requests, known_by) == expected


def test_known_and_unknown_divide_all_records_in_their_order(forgetful):
    everything = BundledWorld(num_edits=None)
    everything.setup()
    known, unknown = (fitted(forgetful, num_edits=None, keep=keep) for keep in ("known", "unknown"))
    at = {id_: place for place, id_ in enumerate(request.case_id for request in everything.requests)}
    places = [[at[request.case_id] for request in stream.requests] for stream in (known, unknown)]
    assert sorted(places[0] + places[1]) == list(range(len(everything.requests)))
    assert all(part == sorted(part) != [] for part in places)
    for stream, request in ((known, known.requests[0]), (unknown, unknown.requests[0])):
        (text,) = greedy_continuations(forgetful, [request.prompt], 8, ".")
        assert text.startswith(request.target_old) == (stream is known)


def test_only_as_many_as_needed_are_examined_and_they_are_counted(forgetful):
    asked = []

    def every_third(requests):
        asked.extend(requests)
        return [len(request.target_old) % 3 == 0 for request in requests]

    stream = fitted(forgetful, every_third, num_edits=10, keep="known")
    count = stream.summary()["records"]["knowledge"]
    assert len(stream.requests) == count["kept"] == count["known"] == 10
    assert count["examined"] == len(stream.left_out) + 10 <= len(asked) < stream.num_candidates
    assert all(len(request.target_old) % 3 == 0 for request in stream.requests)
    assert all("does not give its old answer" in row.reason for row in stream.left_out)
    assert stream.num_edits == 10


def test_records_behind_the_last_one_do_not_change_the_stream(forgetful):
    short, long = (fitted(forgetful, num_edits=count, keep="known").requests for count in (5, 30))
    assert long[:5] == short


def test_nothing_known_and_nothing_asked_are_said(forgetful, tmp_path):
    with pytest.raises(UserError, match=r"data\.keep=known leaves no record: of \d+, the model knows 0"):
        fitted(forgetful, lambda requests: [False] * len(requests), num_edits=5, keep="known")
    with pytest.raises(UserError, match=r"unknown data\.keep 'know': did you mean 'known'"):
        BundledWorld(keep="know")
    with pytest.raises(UserError, match=r"data\.known_by"):
        BundledWorld(keep="known", known_by="eye")
    stream = BundledWorld(keep="known")
    stream.fit(forgetful.tokens)
    with pytest.raises(UserError, match="select"):
        stream.batches()
    file = tmp_path / "edits.jsonl"
    row = {"prompt": "Ann plays the", "target_new": "oboe"}
    rows = [row | {"subject": "Ann"}, row | {"subject": "plays", "target_old": "harp"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = JSONLines(path=str(file), keep="unknown")
    stream.fit(forgetful.tokens)
    stream.select(lambda requests: [False] * len(requests))
    assert [request.target_old for request in stream.requests] == ["harp"]
    assert "has no `target_old`" in stream.left_out[0].reason


def test_run_keeps_known_records_and_resumes_with_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    keep = ("data.num_edits=4", "data.keep=known", "data.seed=3", "+trainer.max_steps=3")
    assert command_line(folder, *QUICK, *keep) == 0
    summary = json.loads((folder / "summary.json").read_text())
    counts = summary["records"]["knowledge"]
    assert (counts["keep"], counts["known_by"], counts["kept"]) == ("known", "exact_match", 4)
    assert counts["known"] == 4 <= counts["examined"]
    assert summary["phases"]["knowledge"] > 0
    answers = json.loads((folder / "knowledge.json").read_text())
    lines = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert answers[f"{line['request']['prompt']} {line['request']['target_old']}"]
    # Another device may round otherwise; the stream is still that of the run.
    monkeypatch.setattr("prune_lightning.tasks.knowing.gives_old_answers", lambda model, rows, by: [False] * len(rows))
    assert command_line(folder, f"resume={folder}", "trainer.max_steps=-1") == 0
    resumed = json.loads((folder / "summary.json").read_text())
    assert resumed["records"]["knowledge"] == counts
    again = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    assert [line["request"] for line in again[:3]] == [line["request"] for line in lines]
    assert len(again) == 4
