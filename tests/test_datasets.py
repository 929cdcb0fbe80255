"""Readers of further public data sets, and the questions that some of them ask after a group of edits."""

from __future__ import annotations

import csv
import json
import warnings

import pytest
import torch
from conftest import SHARED

from prune_lightning.bundled.world import load_world
from prune_lightning.data.hallueditbench import HalluEditBench
from prune_lightning.data.jsonl import JSONLines
from prune_lightning.data.mquake import MQuAKE
from prune_lightning.data.placing import placed
from prune_lightning.data.qaedit import QAEdit
from prune_lightning.data.rippleedits import RippleEdits
from prune_lightning.data.wikibigedit import WikiBigEdit
from prune_lightning.errors import UserError
from prune_lightning.evaluation.measurement import Stream
from prune_lightning.evaluation.questions import ConsequenceQuestions
from prune_lightning.questions import Group, PlacedGroup, Query, Question
from prune_lightning.types import EditBatch, EditRequest, Probe

warnings.filterwarnings("ignore", message=".*left out.*")
FACT = {"subject": "France", "prompt": "The capital of France is", "target_new": "Lyon"}


def read(reader, path, rows=None, **options):
    if rows is not None:
        path.write_text(json.dumps(rows))
    stream = reader(str(path), **options)
    stream.setup()
    return stream


def edit(prompt, target, case=0):
    return EditRequest(case, prompt.split()[0], prompt, target)


# -- from the hub -----------------------------------------------------------------------------------------------------
def test_a_data_set_of_the_hub_gives_the_requests_of_its_file(tmp_path):
    folder = tmp_path / "facts"
    folder.mkdir()
    rows = [FACT, {**FACT, "subject": "Spain", "prompt": "The capital of Spain is", "target_old": "Madrid"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text(json.dumps(rows[1]))
    local = read(JSONLines, folder / "train.jsonl")
    hub = read(JSONLines, f"hub://{folder}", hub={"split": "train", "config": None})
    assert hub.requests == local.requests
    with pytest.raises(UserError, match="splits train, test: choose one with"):
        read(JSONLines, f"hub://{folder}")
    with pytest.raises(UserError, match=r"key of data\.hub 'splits'"):
        read(JSONLines, f"hub://{folder}", hub={"splits": "train"})
    with pytest.raises(UserError, match=r"cannot be loaded.*give data\.path=FILE|switched off"):
        read(JSONLines, f"hub://{tmp_path / 'absent'}")


# -- one edit a record ------------------------------------------------------------------------------------------------
WIKIBIGEDIT = [
    {
        **{"subject": "Ada Ek", "update": "Where was Ada Ek born?", "ans": "Oslo", "rephrase": "Ada Ek's birthplace?"},
        **{"personas": "Arr, where be Ada Ek born?", "mhop": "Which country was Ada Ek born in?", "mhop_ans": "Norway"},
        **{"loc": "Who wrote Faust?", "loc_ans": "Goethe", "tag": "x"},
    },
    {
        **{"subject": "Bo Li", "prompt": "Where was Bo Li born?", "target_new": "Xi'an", "rephrase_prompt": "r?"},
        **{"locality_prompt": "Who wrote Emma?", "locality_ground_truth": "Austen"},
    },
]


def test_wikibigedit_in_both_schemas(tmp_path):
    hub = WIKIBIGEDIT[0]
    first, second = read(WikiBigEdit, tmp_path / "wbe.json", WIKIBIGEDIT).requests
    assert (first.prompt, first.target_new, first.paraphrases) == (hub["update"], "Oslo", (hub["rephrase"],))
    assert first.locality == (Probe("Who wrote Faust?", "Goethe", "unrelated"),)
    assert first.portability == (
        Probe(hub["personas"], "Oslo", "personas"),
        Probe(hub["mhop"], "Norway", "multi_hop"),
    )
    assert (second.subject, second.target_new, second.target_old) == ("Bo Li", "Xi'an", None)
    assert second.locality == (Probe("Who wrote Emma?", "Austen"),)


QAEDIT = {
    **{"id": 9, "prompt": "who won the cup?", "subject": "cup", "target": "Ajax *", "rephrase": "Whose is the cup?"},
    "locality": [{"loc": f"q{i}", "loc_ans": f"a{i}"} for i in range(5)],
}


def test_qaedit_takes_as_many_locality_questions_as_asked(tmp_path):
    path = tmp_path / "qa.json"
    (request,) = read(QAEdit, path, [QAEDIT]).requests
    assert (request.case_id, request.target_new, len(request.locality)) == (9, "Ajax *", 5)
    (request,) = read(QAEdit, path, probes=1).requests
    assert request.locality == (Probe("q0", "a0", "unrelated"),)
    with pytest.raises(UserError, match=r"line 1: the key 'locality\[1\].loc_ans' is missing"):
        read(QAEdit, path, [{**QAEDIT, "locality": [QAEDIT["locality"][0], {"loc": "q"}]}])


HALLUEDITBENCH = {
    **{"subject": "Venus, the", "object": "marble", "question": "What is Venus, the\nmade of?", "output_m": "Bronze"},
    **{"paraphrased_question": "p?", "locality_question": "l?", "yes_question": "y?", "no_question": "n?"},
    **{"multiple_choice_with_letters": "A. Bronze  B. marble", "multiple_choice_labels": "B"},
    **{"reversed_relation_question": "What is marble?", "question_2hop": "Who made the marble Venus?"},
    "answer_2hop": "Gian",
}


def write_csv(path, *rows):
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_hallueditbench_reads_a_folder_and_names_the_file_of_a_bad_row(tmp_path):
    good = HALLUEDITBENCH
    write_csv(tmp_path / "a.csv", good)
    write_csv(tmp_path / "b.csv", good | {"object": "wood", "question": "no such thing?"})
    with pytest.raises(UserError, match=r"line 2: b\.csv: the subject 'Venus, the'"):
        read(HalluEditBench, tmp_path)
    stream = read(HalluEditBench, tmp_path, bad_rows="skip")
    (request,) = stream.requests
    assert (request.target_new, request.target_old, request.paraphrases) == ("marble", "Bronze", ("p?",))
    assert request.locality == (Probe("l?", None, "unrelated"),)
    (group,) = stream.groups()
    asked = {question.kind: (question.queries[0].prompt, question.queries[0].answers) for question in group.questions}
    assert asked == {
        "yes": ("y?", (("Yes",),)),
        "no": ("n?", (("No",),)),
        "multiple_choice": (f"{good['question']} A. Bronze  B. marble", (("B",),)),
        "reversed_relation": ("What is marble?", (("Venus, the",),)),
        "2_hop": ("Who made the marble Venus?", (("Gian",),)),
    }


def ripple(relation, prompt, subject, *names):
    answers = [{"value": value, "aliases": aliases} for value, *aliases in names]
    return {"prompt": prompt, "answers": answers, "relation": relation, "subject_id": subject, "query_type": "regular"}


TOWN = "The name of the country of citizenship of Duke of York is"
MOTHER = ripple("MOTHER", "The name of the mother of Duke of York is", "Q1", ["Ann", "Anna", "A"])
TEAM = ripple("TEAM", "The name of the sports team which Duke of York is a member of is", "Q1", ["Reds"], ["Blues"])
RIPPLEEDITS = {
    "example_type": "popular",
    "edit": {
        **{"prompt": f"{TOWN} United Arab Emirates.", "subject_id": "Q1", "relation": "CITIZENSHIP"},
        "original_fact": {"prompt": f"{TOWN} United States.", "subject_id": "Q1"},
    },
    "Relation_Specifity": [{"test_queries": [TEAM, MOTHER], "test_condition": "AND", "condition_queries": [MOTHER]}],
    "Forgetfulness": [],
}


def test_rippleedits_finds_subject_and_targets(tmp_path):
    stream = read(RippleEdits, tmp_path / "r.json", [RIPPLEEDITS])
    (request,) = stream.requests
    assert (request.prompt, request.subject) == (TOWN, "Duke of York")
    assert (request.target_new, request.target_old) == ("United Arab Emirates", "United States")
    asked = Query(MOTHER["prompt"], (("Ann", "Anna"),))
    both = (Query(TEAM["prompt"], (("Reds",), ("Blues",))), asked)
    expected = Question("Relation_Specificity", both, every=True, given=(asked,))
    assert stream.groups() == (Group(0, ((TOWN, "United Arab Emirates"),), (expected,)),)
    rows = [RIPPLEEDITS | {"Relation_Specifity": [{"test_queries": [TEAM], "test_condition": "XOR"}]}]
    with pytest.raises(UserError, match=r"`Relation_Specifity\[0\].test_condition` is expected to be AND or OR"):
        read(RippleEdits, tmp_path / "r.json", rows)


# -- several edits a record -------------------------------------------------------------------------------------------
def rewrite(subject, relation, target):
    return {
        "subject": subject,
        "prompt": f"{{}} {relation}",
        "target_new": {"str": target},
        "target_true": {"str": "x"},
    }


def mquake_case(number, *rewrites):
    hop = {"question": "q", "cloze": "c", "answer": "a", "answer_alias": ["b"]}
    row = {"case_id": number, "requested_rewrite": list(rewrites), "questions": ["one?", "two?"], "new_answer": "Rome"}
    return row | {"new_answer_alias": ["Roma"], "new_single_hops": [hop]}


CASES = [
    mquake_case(7, rewrite("Ann", "married", "Bob"), rewrite("Bob", "lives in", "Rome")),
    mquake_case(8, rewrite("Bob", "lives in", "Rome"), rewrite("Cy", "works for", "Bob")),
    mquake_case(9, rewrite("Di", "likes", "Cy")),
]


def test_mquake_writes_a_shared_edit_once_and_keeps_cases_together(tmp_path):
    path = tmp_path / "m.json"
    stream = read(MQuAKE, path, CASES, unique_subjects=False)
    assert [request.case_id for request in stream.requests] == ["7/0", "7/1", "8/1", "9/0"]
    assert [row.reason for row in stream.left_out] == ["it repeats the edit of line 1"]
    assert [(one.group.name, one.case) for one in stream.placed_groups()] == [(7, 1), (8, 2), (9, 3)]
    multi, single = stream.groups()[0].questions
    assert multi == Question("multi_hop", (Query("one?", (("Rome", "Roma"),)), Query("two?", (("Rome", "Roma"),))))
    assert single == Question("single_hops", (Query("c", (("a", "b"),)),), every=True)
    for protocol, size, steps in (("batch", 1, [2, 2, 1]), ("batch", 2, [4, 1]), ("sequential_batched", 2, [3, 1])):
        stream = read(MQuAKE, path, protocol=protocol, batch_size=size, unique_subjects=False)
        assert [len(step.requests) for step in stream.batches()] == steps
    resumed = read(MQuAKE, path, protocol="sequential_batched", batch_size=1, unique_subjects=False, done=(2,))
    assert [len(step.requests) for step in resumed.batches()] == [2, 1, 1]
    shuffled = read(MQuAKE, path, protocol="batch", shuffle=True, seed=1, unique_subjects=False)
    assert sorted(len(step.requests) for step in shuffled.batches()) == [1, 2, 2]


def test_where_groups_are_complete():
    first, second, third, again = edit("a b", "c"), edit("d e", "f"), edit("g h", "i"), edit("a b", "z")
    facts = [one.fact for one in (first, second, third)]
    both, alone, absent = Group(0, tuple(facts[:2]), ()), Group(1, tuple(facts[2:]), ()), Group(2, (("x", "y"),), ())
    half = Group(3, (facts[0], ("x", "y")), ())
    stream = [EditBatch((one,)) for one in (first, second, third, again)]
    assert placed([both, alone, absent, half], stream, {0: 4}) == [
        PlacedGroup(both, 1, until=4),
        PlacedGroup(alone, 2),
        PlacedGroup(half, None),
    ]
    single = [EditBatch((one,), from_base=True) for one in (first, second)]
    assert placed([both], single, {}) == [PlacedGroup(both, None)]
    together = [EditBatch((third,), from_base=True), EditBatch((second, first), from_base=True)]
    assert placed([both], together, {}) == [PlacedGroup(both, 2)]


def test_questions_are_scored_once_their_group_is_complete(bundled_shared):
    model = bundled_shared
    prompts = [fact.phrasings[0] for fact in load_world().facts[:40:10]]
    said = ConsequenceQuestions()._answers(model, [Query(prompt, ()) for prompt in prompts])
    right = [Query(query.prompt, ((answer.text.strip(" ."), "x"),)) for query, answer in said.items()]
    wrong = [Query(query.prompt, (("nothing",),)) for query in right]
    either = Question("either", (wrong[0], right[1]))
    every = Question("every", (wrong[0], right[1]), every=True)
    all_right = Question("every", tuple(right[:2]), every=True)
    conditional = Question("either", (right[2],), given=(wrong[2],))
    vain = Question("vain", (Query(right[3].prompt, (right[3].answers[0], ("nothing",))),))
    groups = [PlacedGroup(Group(0, (), (either, every, conditional)), case=1), PlacedGroup(Group(1, (), (vain,)), None)]
    groups += [PlacedGroup(Group(2, (), (all_right,)), case=2), PlacedGroup(Group(3, (), (every,)), case=2, until=3)]
    measurement = ConsequenceQuestions()
    measurement.prepare(Stream(groups=groups))
    requests = [edit(f"a {i}", "c", i) for i in range(4)]
    measurement.take_reference(model, dict(enumerate(requests)))
    assert measurement.facts() == {"groups": 3, "incomplete_groups": 1, "questions": 4, "questions_left_out": 1}
    early = measurement.measure(model, {0: requests[0]}).scores
    assert all(torch.isnan(torch.tensor(value)) for value in early.values())
    after = measurement.measure(model, dict(enumerate(requests[:2])))
    assert (after.scores["either_contains"], after.scores["every_contains"]) == (1.0, 0.0)
    assert after.scores["either_exact_match"] == 1.0
    assert [row["case"] for row in after.cases] == [0, 1]
    # case 1: 0, case 2: 1; the group that a third edit overwrites is not asked any more
    later = measurement.measure(model, dict(enumerate(requests[:3]))).scores
    assert (later["every_contains"], later["either_contains"]) == (0.5, 1.0)
    idle = ConsequenceQuestions()
    idle.prepare(Stream(requests))
    assert not idle.jobs(model, dict(enumerate(requests)))


# -- the published files ----------------------------------------------------------------------------------------------
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of the project")
@pytest.mark.parametrize(
    ("reader", "file", "requests", "groups"),
    [
        (WikiBigEdit, "wikibigedit_1000.json", 1000, 0),
        (QAEdit, "qaedit_500.json", 500, 0),
        (MQuAKE, "mquake_hard_100.json", 400, 100),
    ],
)
def test_published_files_are_read_whole(reader, file, requests, groups):
    stream = reader(str(SHARED / "data" / file))
    usable, rejected = stream.read()
    assert (len(usable), rejected, len(stream.groups())) == (requests, [], groups)
    assert all(one.request.prompt[one.request.subject_start :].startswith(one.request.subject) for one in usable)
