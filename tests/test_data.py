from __future__ import annotations

import json

import pytest
from conftest import SHARED

from prune_lightning.data.bundled import BundledWorld
from prune_lightning.data.counterfact import CounterFact
from prune_lightning.data.jsonl import JSONLines
from prune_lightning.data.zsre import ZsRE
from prune_lightning.errors import UserError
from prune_lightning.types import EditRequest, Probe

ORIGINAL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "subject": "Ann",
        "target_new": {"str": "oboe", "id": "Q1"},
        "target_true": {"str": "harp", "id": "Q2"},
    },
    "paraphrase_prompts": ["On stage Ann plays the"],
    "neighborhood_prompts": ["Bob plays the", "Cid plays the"],
}
EASYEDIT = {
    "case_id": 8,
    "prompt": "Eve lives in",
    "subject": "Eve",
    "target_new": "Rome",
    "ground_truth": "Oslo",
    "rephrase_prompt": "The home of Eve is",
    "locality_prompt": "Dan lives in",
    "locality_ground_truth": "Oslo",
}


def write(path, rows, indent=None):
    path.write_text(json.dumps(rows, indent=indent))
    return str(path)


def test_counterfact_reads_both_schemas(tmp_path):
    stream = CounterFact(write(tmp_path / "cf.json", [ORIGINAL, EASYEDIT]), num_edits=None)
    stream.setup()
    assert stream.requests == [
        EditRequest(
            7,
            "Ann",
            "Ann plays the",
            "oboe",
            "harp",
            ("On stage Ann plays the",),
            (Probe("Bob plays the", "harp"), Probe("Cid plays the", "harp")),
        ),
        EditRequest(
            8, "Eve", "Eve lives in", "Rome", "Oslo", ("The home of Eve is",), (Probe("Dan lives in", "Oslo"),)
        ),
    ]


def test_zsre_targets_and_question_mark(tmp_path):
    row = {
        "subject": "UniFirst",
        "src": "What is made by UniFirst?",
        "pred": "uniform",
        "rephrase": "UniFirst makes what?",
        "alt": "aircraft",
        "answers": ["uniform"],
        "loc": "nq question: who sang it",
        "loc_ans": "Eve",
    }
    path = write(tmp_path / "zsre.json", [row])
    alternative, true = ZsRE(path=path), ZsRE(path=path, target="answers")
    alternative.setup()
    true.setup()
    assert (alternative.requests[0].target_new, alternative.requests[0].target_old) == ("aircraft", "uniform")
    assert true.requests[0].target_new == "uniform"
    assert alternative.requests[0].locality == (Probe("who sang it?", "Eve", "unrelated"),)
    published = ZsRE(path=path, nq_prefix=True)
    published.setup()
    assert published.requests[0].locality == (Probe("nq question: who sang it?", "Eve", "unrelated"),)


def test_bad_rows_are_listed_by_line_and_skipped_or_fatal(tmp_path):
    rows = [
        {"subject": "Ann", "prompt": "Ann plays the", "target_new": "oboe"},
        {"subject": "Bob", "prompt": "Cid plays the", "target_new": "oboe"},
        {"subject": "Dan", "prompt": "Dan plays the", "target_new": " "},
        {"subject": "Eve", "prompt": "Eve plays the"},
        {"subject": "Fay", "prompt": "Fay plays the", "target_new": "harp", "paraphrase": ["Fay"]},
        {"subject": 3, "prompt": "3 plays the", "target_new": "harp"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n{broken\n[1]\n")
    stream = JSONLines(str(path), bad_rows="skip")
    with pytest.warns(UserWarning, match="line 2: the subject 'Bob' is not in its prompt"):
        stream.setup()
    assert [request.subject for request in stream.requests] == ["Ann"]
    assert [row.line for row in stream.rejected] == [2, 3, 4, 5, 6, 7, 8]
    assert "did you mean 'paraphrases'" in stream.rejected[3].reason
    with pytest.raises(UserError, match="line 4: the key 'target_new' is missing"):
        JSONLines(str(path), bad_rows="fail").setup()


def test_lines_of_an_indented_array_are_those_of_the_file(tmp_path):
    broken = {**EASYEDIT, "subject": "Nobody"}
    path = write(tmp_path / "cf.json", [EASYEDIT, broken], indent=1)
    stream = CounterFact(path, bad_rows="skip")
    with pytest.warns(UserWarning, match="cannot be used"):
        stream.setup()
    text = (tmp_path / "cf.json").read_text().splitlines()
    assert text[stream.rejected[0].line - 1].strip() == "{"
    assert "Nobody" in "\n".join(text[stream.rejected[0].line - 1 :])


def test_truncated_array_is_reported(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([EASYEDIT, EASYEDIT])[:-60])
    stream = CounterFact(str(path), bad_rows="skip")
    with pytest.warns(UserWarning, match="nothing after it can be read"):
        stream.setup()
    assert len(stream.requests) == 1


def test_unique_subjects_and_too_few_requests(tmp_path):
    path = write(tmp_path / "cf.json", [EASYEDIT, {**EASYEDIT, "subject": "Eve", "target_new": "Bonn"}])
    stream = CounterFact(path)
    with pytest.warns(UserWarning, match=r"1 records are left out:\n  line 1: its subject 'Eve' is that of line 1"):
        stream.setup()
    assert [request.target_new for request in stream.requests] == ["Rome"]
    assert len(stream.summary()["records"]["left_out"]) == 1
    every = CounterFact(path, num_edits=100, unique_subjects=False)
    with pytest.warns(UserWarning, match="data.num_edits is 100, but only 2 records are usable; all are taken"):
        every.setup()
    assert (every.summary()["records"]["asked"], len(every.requests), every.left_out) == (100, 2, [])


def test_missing_file_names_near_matches(tmp_path):
    write(tmp_path / "counterfact.json", [])
    with pytest.raises(UserError, match=r"did you mean 'counterfact.json'"):
        CounterFact(str(tmp_path / "counterfat.json")).setup()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"protocol": "sequental"}, "did you mean 'sequential'"),
        ({"protocol": "single", "batch_size": 4}, "one edit at a time"),
        ({"bad_rows": "ignore"}, "choose from 'fail', 'skip'"),
        ({"num_edits": 0}, "at least 1"),
        ({"num_edits": "ten"}, "whole number"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        BundledWorld(**kwargs)


@pytest.mark.parametrize(
    ("protocol", "size", "steps", "from_base"),
    [("single", 1, 7, True), ("batch", 3, 3, True), ("sequential", 1, 7, False), ("sequential_batched", 3, 3, False)],
)
def test_protocols_group_the_stream(protocol, size, steps, from_base):
    stream = BundledWorld(num_edits=7, protocol=protocol, batch_size=size)
    stream.setup()
    batches = list(stream.train_dataloader())
    assert len(batches) == steps
    assert [request for batch in batches for request in batch.requests] == stream.requests
    assert all(batch.from_base is from_base for batch in batches)


def test_bundled_stream_is_fixed_by_its_seed_and_not_by_its_length():
    short, long, other = (BundledWorld(num_edits=n, seed=s) for n, s in ((20, 1), (50, 1), (20, 2)))
    for stream in (short, long, other):
        stream.setup()
    assert long.requests[:20] == short.requests
    assert other.requests != short.requests


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of the project")
@pytest.mark.parametrize(("reader", "file"), [(CounterFact, "counterfact_2000.json"), (ZsRE, "zsre_1000.json")])
def test_real_records_flow(reader, file):
    stream = reader(path=str(SHARED / "data" / file), num_edits=500, bad_rows="skip")
    stream.setup()
    assert len(stream.requests) == 500
    assert all(request.paraphrases and request.locality and request.target_old for request in stream.requests)


def test_what_the_protocols_need_is_read(tmp_path):
    knowedit = {
        "Reasoning": [
            {"prompt": "The river in the home of Eve is ", "ground_truth": [["Tiber", "Tevere"], ["Aniene"]]}
        ],
        "Subject_Aliasing": [
            {"prompt": "Evi lives in", "ground_truth": "Rome"},
            {"prompt": "no answer", "ground_truth": []},
        ],
    }
    rows = [ORIGINAL | {"generation_prompts": ["Ann went to"]}, EASYEDIT | {"portability": knowedit}]
    stream = CounterFact(path=write(tmp_path / "a.json", rows), num_edits=2)
    stream.setup()
    assert stream.requests[0].generation_prompts == ("Ann went to",)
    assert stream.requests[0].portability == ()
    assert stream.requests[1].portability == (
        Probe("The river in the home of Eve is", "Tiber", "Reasoning", ("Tevere", "Aniene")),
        Probe("Evi lives in", "Rome", "Subject_Aliasing"),
    )

    row = {"subject": "Eve", "src": "Where is Eve?", "alt": "Rome", "answers": ["Oslo"]}
    row["portability"] = {"Recalled Relation": "r", "New Question": "Which river is near Eve?", "New Answer": "Tiber"}
    zsre = ZsRE(path=write(tmp_path / "b.json", [row]), num_edits=1)
    zsre.setup()
    assert zsre.requests[0].portability == (Probe("Which river is near Eve?", "Tiber", "Reasoning"),)

    own = {"subject": "Eve", "prompt": "Eve lives in", "target_new": "Rome", "generation_prompts": ["Eve met"]}
    own |= {"references": ["Rome is a town"], "portability": [{"prompt": "The river is", "answer": "Tiber"}]}
    lines = JSONLines(path=write(tmp_path / "c.jsonl", own), num_edits=1)
    lines.setup()
    (request,) = lines.requests
    assert (request.generation_prompts, request.references) == (("Eve met",), ("Rome is a town",))
    assert request.portability == (Probe("The river is", "Tiber", "consequence"),)
