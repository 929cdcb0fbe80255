"""Where a subject stands, what stands before a target, and what becomes of every record."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import BUNDLED, SHARED, quiet_trainer
from stream_entries import filled
from test_fuzz import command_line
from test_guards import Counted

from prune_lightning.callbacks import EditEvaluation, EditLog
from prune_lightning.data.counterfact import CounterFact
from prune_lightning.data.jsonl import JSONLines
from prune_lightning.data.knowedit import KnowEdit
from prune_lightning.data.zsre import ZsRE
from prune_lightning.errors import UserError
from prune_lightning.evaluation.case_sampler import CaseSampler
from prune_lightning.evaluation.stream import StreamScores
from prune_lightning.metrics import RetentionMatrix
from prune_lightning.models.loading import load_tokens
from prune_lightning.models.tokenization import Tokens
from prune_lightning.records import read_objects
from prune_lightning.requests import EditRequest, Probe
from prune_lightning.text.separators import infer, join
from prune_lightning.text.subjects import locate

FRANCE = {"subject": "France", "prompt": "The capital of France is", "target_new": "Lyon", "target_old": "Paris"}
YEN = {"subject": "France", "prompt": "The currency of France is", "target_new": "yen", "target_old": "euro"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def check(tmp_path, path, *arguments):
    code = command_line(tmp_path / "check", "experiment=check", f"data.path={path}", *arguments)
    return code, json.loads((tmp_path / "check" / "check.json").read_text())


# -- subjects ---------------------------------------------------------------------------------------------------------
def test_counterfact_keeps_where_its_subject_stands(tmp_path):
    rewrite = {"prompt": "Also in 1990 {} moved to", "subject": "Al"}
    rewrite |= {"target_new": {"str": "Norway"}, "target_true": {"str": "California"}}
    path = tmp_path / "cf.json"
    path.write_text(json.dumps([{"case_id": 0, "requested_rewrite": rewrite}]))
    stream = CounterFact(str(path))
    stream.setup()
    assert (stream.requests[0].subject_start, stream.remarks) == (13, [])


@pytest.mark.parametrize(
    ("subject", "prompt", "start", "doubt"),
    [
        ("Al", "Also in 1990 Al moved to", 13, None),
        ("Al", "Also in 1990 he moved to", 0, "inside the word 'Also'"),
        ("France", "France is France, says", 0, "2 times"),
        ("5", "15 and 25 and 5 are", 14, None),
        ("Ann", "Ann_1 met Ann in", 10, None),
        ("京", "东京是京", 1, "2 times"),
        ("サ", "ガササ", 1, "2 times"),
        ("한국", "한국의 수도는", 0, None),
        ("e", "cafe\u0301 e bar", 6, None),
    ],
)
def test_subject_is_the_first_whole_word(subject, prompt, start, doubt):
    place = locate(subject, prompt)
    assert place.start == start
    assert place.doubt is None if doubt is None else doubt in str(place.doubt)


@pytest.mark.parametrize(
    ("subject", "prompt", "message"),
    [
        ("france", "The capital of France is", "there it is written 'France'"),
        ("Al", "Also an Album is", "only inside words"),
        ("caf\u00e9", "The cafe\u0301 is", "different Unicode forms"),
    ],
)
def test_subjects_that_stay_ambiguous_are_refused(subject, prompt, message):
    with pytest.raises(UserError, match=message):
        locate(subject, prompt)


def test_subject_start_chooses_and_is_checked(tmp_path):
    own = {"subject": " Al", "prompt": "Al met Al in", "target_new": "Oslo", "subject_start": 6}
    path = lines(tmp_path / "own.jsonl", own, own | {"subject_start": 1}, own | {"subject_start": "6"})
    stream = JSONLines(path, bad_rows="skip", unique_subjects=False)
    with pytest.warns(UserWarning, match="records cannot be used"):
        stream.setup()
    assert [(request.subject, request.subject_start) for request in stream.requests] == [("Al", 7)]
    assert [row.reason for row in stream.rejected] == [
        "the subject 'Al' is not at character 2 of its prompt, there is ' m'",
        "`subject_start` is expected to be a whole number, but got '6'",
    ]


def test_blanks_of_a_subject_are_dropped(tmp_path):
    stream = JSONLines(lines(tmp_path / "own.jsonl", FRANCE | {"subject": "France "}))
    stream.setup()
    assert stream.requests[0].subject_end == len("The capital of France")
    assert "`subject` 'France ' has whitespace" in stream.remarks[0].reason


# -- separators -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("separator", "text"),
    [
        ("auto", "The capital of France is Lyon"),
        ("blank", "The capital of France is Lyon"),
        ("none", "The capital of France isLyon"),
        ("", "The capital of France isLyon"),
        ("\n", "The capital of France is\nLyon"),
        (" -> ", "The capital of France is -> Lyon"),
    ],
)
def test_separator_of_a_run_and_of_a_record(separator, text, tmp_path):
    own = FRANCE | {"paraphrases": ["France:"], "locality": [{"prompt": "Spain's", "answer": "Rome", "separator": "+"}]}
    of_run = JSONLines(lines(tmp_path / "a.jsonl", own), separator=separator)
    of_record = JSONLines(lines(tmp_path / "b.jsonl", own | {"separator": separator}), separator="-")
    of_run.setup()
    of_record.setup()
    for stream, run in ((of_run, separator), (of_record, "-")):
        (request,) = stream.requests
        if separator == "auto" and stream is of_record:
            text = text.replace(" Lyon", "-Lyon")
        assert request.pair().text == text
        assert request.pair("Paris").text == text.replace("Lyon", "Paris")
        assert request.locality[0].pair().text == "Spain's+Rome"
        assert request.pair().continuation.startswith(" ") == text.endswith(" Lyon"), run


@pytest.mark.parametrize(
    ("prompt", "target", "doubt"),
    [
        ("The capital of Japan is", "東京", "script without blanks"),
        ("日本の首都は", "Tokyo", "script without blanks"),
        ("The capital is  ", "Lyon", "literally"),
        ("The capital is ", " Lyon", "whitespace"),
        ("The capital is", ", of course", "closing punctuation"),
        ("The capital is", "Lyon", None),
        ("Capital?\n", "Lyon", None),
    ],
)
def test_doubtful_separators_are_reported(prompt, target, doubt):
    found = infer(prompt, target).doubt
    assert found is None if doubt is None else doubt in str(found)


def test_one_blank_where_both_sides_bring_one():
    assert join("The capital is ", " Lyon ").text == "The capital is Lyon"


def test_a_start_token_in_the_text_is_the_only_one(bundled_shared):
    tokens = bundled_shared.tokens
    start = tokens.tokenizer.bos_token
    plain, own = tokens.encode_pair("Ann is", "old"), tokens.encode_pair(f"{start}Ann is", "old")
    assert own == plain
    assert tokens.subject_last(f"{start}Ann is", len(start) + 3) == tokens.subject_last("Ann is", 3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_chat_template_is_written_and_scored(family, tiny, tmp_path):
    model = tiny(family)
    model.tokens.tokenizer.chat_template = TEMPLATE
    own = FRANCE | {"paraphrases": ["France is governed from "], "locality": [{"prompt": "Spain?", "answer": "Rome"}]}
    stream = JSONLines(lines(tmp_path / "own.jsonl", own), chat_template=True)
    stream.setup()
    with pytest.raises(UserError, match="needs the tokenizer"):
        stream.batches()
    stream.fit(model.tokens)
    (request,) = stream.requests
    turns = [{"role": "user", "content": FRANCE["prompt"]}]
    rendered = model.tokens.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert request.pair().text == rendered + "Lyon"
    assert request.paraphrase_pairs()[0].text.endswith("France is governed from<|end|>\n<|assistant|>\nLyon")
    assert request.locality[0].pair().context.endswith("Spain?<|end|>\n<|assistant|>\n")
    text, end = request.behind("Well. ")
    assert text.context[:end].endswith("<|user|>\nWell. The capital of France")
    ids = model.tokens.encode_pairs([request.pair()])[0].ids
    assert ids == model.tokens.tokenizer(rendered + "Lyon", add_special_tokens=False)["input_ids"]
    assert EditRequest.from_dict(json.loads(json.dumps(request.as_dict()))) == request


def test_chat_template_is_refused_where_there_is_none(tmp_path):
    stream = JSONLines(lines(tmp_path / "own.jsonl", FRANCE), chat_template=True)
    with pytest.raises(UserError, match="no chat template"):
        stream.fit(load_tokens(BUNDLED))


# -- records ----------------------------------------------------------------------------------------------------------
def test_every_record_left_out_is_named(tmp_path, capsys):
    path = lines(tmp_path / "own.jsonl", FRANCE, YEN, FRANCE | {"target_new": "Nice"})
    code, found = check(tmp_path, path, "data=jsonl")
    assert code == 0
    assert [row["line"] for row in found["left_out"]] == [2, 3]
    assert "left out: line 2: its subject 'France' is that of line 1" in capsys.readouterr().out
    stream = JSONLines(path)
    with pytest.warns(UserWarning, match="2 records are left out"):
        stream.setup()
    assert [row["line"] for row in stream.summary()["records"]["left_out"]] == [2, 3]


def test_a_later_target_supersedes(tmp_path):
    rows = [FRANCE, YEN, FRANCE | {"target_new": "Nice"}, FRANCE | {"target_new": "Nice"}, FRANCE]
    path = lines(tmp_path / "own.jsonl", *rows)
    stream = JSONLines(path, unique_subjects=False, num_edits=None)
    stream.setup()
    assert stream.superseded() == {0: 3, 3: 5}
    assert stream.summary()["records"]["superseded"] == [{"edit": 1, "by_edits": 3}, {"edit": 4, "by_edits": 5}]
    batched = JSONLines(path, unique_subjects=False, protocol="sequential_batched", batch_size=2, num_edits=None)
    batched.setup()
    assert batched.superseded() == {0: 4, 3: 5}
    single = JSONLines(path, unique_subjects=False, protocol="single", num_edits=None)
    single.setup()
    assert single.superseded() == {}


def test_superseded_edits_are_not_forgotten():
    rows = [(1, 1, 0, 1.0), (2, 2, 1, 1.0), (3, 3, 2, 1.0), (3, 1, 0, 0.0), (3, 2, 1, 1.0)]
    plain = filled(rows).compute()
    metric = RetentionMatrix(superseded={0: 3})
    for t, commit, case, value in rows:
        metric.update(t, torch.tensor([commit]), torch.tensor([case]), torch.tensor([value]))
    assert (float(plain["forgetting"]), float(plain["final"])) == (0.5, pytest.approx(2 / 3))
    found = metric.compute()
    assert (float(found["forgetting"]), float(found["final"]), float(found["acquisition"])) == (0.0, 1.0, 1.0)
    assert list(CaseSampler([1, 2, 3], superseded={0: 3}).chosen(2)) == [0, 1]
    assert list(CaseSampler([1, 2, 3], superseded={0: 3}).chosen(3)) == [1, 2]


def test_a_run_leaves_superseded_edits_out_of_its_scores(tiny, tmp_path):
    path = lines(tmp_path / "own.jsonl", FRANCE | {"case_id": 1}, FRANCE | {"case_id": 2, "target_new": "Nice"})
    stream = JSONLines(path, unique_subjects=False, num_edits=None)
    stream.setup()
    scores = StreamScores(stream.superseded())
    module, log = Counted(tiny("gpt2"), [1]), EditLog(None, scores)
    quiet_trainer(log, EditEvaluation([1, 2], [], scores)).fit(module, datamodule=stream)
    seen = scores.matrices["accuracy"].observations()
    assert [(int(t), int(i)) for t, i in zip(seen.time, seen.case, strict=True) if t] == [(1, 0), (1, 1), (2, 1)]


KNOWEDIT = {
    "subject": "Frances Hodgson",
    "prompt": "The place of birth of Frances Hodgson is",
    "target_new": "Leeds",
    "ground_truth": "Manchester",
    "portability": {
        "Logical_Generalization": [{"prompt": "Frances Hodgson was born in", "ground_truth": [["Yorkshire", "York"]]}],
        "Reasoning": [{"prompt": "No answer", "ground_truth": []}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Frances Hodgson is", "ground_truth": [["female"], ["f"]]}],
        "Forgetfulness": [{"prompt": "Frances Hodgson lived in", "ground_truth": [[""]]}],
    },
}


def test_knowedit_is_read_whole(tmp_path):
    lists = KNOWEDIT | {"target_new": ["York", "Leeds"], "ground_truth": [["Bath"]], "rephrase_prompt": "Born in"}
    biography = {"concept": "Ann", "text": "Ann was", "labels": "a poet", "locality": KNOWEDIT["locality"]}
    path = tmp_path / "knowedit.json"
    path.write_text(json.dumps([KNOWEDIT, lists, biography]))
    stream = KnowEdit(str(path), unique_subjects=False, num_edits=None)
    stream.setup()
    first, second, third = stream.requests
    assert first.locality == (
        Probe("The gender of Frances Hodgson is", "female", "Relation_Specificity", ("f",)),
        Probe("Frances Hodgson lived in", None, "Forgetfulness"),
    )
    assert first.portability == (
        Probe("Frances Hodgson was born in", "Yorkshire", "Logical_Generalization", ("York",)),
    )
    assert (second.target_new, second.target_old, second.paraphrases) == ("York", "Bath", ("Born in",))
    assert (third.subject, third.prompt, third.target_new, third.target_old) == ("Ann", "Ann was", "a poet", None)
    assert "1 of 2 portability prompts have no answer" in stream.remarks[0].reason
    through_counterfact = CounterFact(str(path), bad_rows="skip", num_edits=1)
    with pytest.warns(UserWarning, match="records cannot be used"):
        through_counterfact.setup()
    assert through_counterfact.requests[0].locality == first.locality
    with pytest.raises(UserError, match="use data=knowedit"):
        JSONLines(str(path)).setup()


# -- before the first edit --------------------------------------------------------------------------------------------
def test_requests_are_checked_against_the_model_before_the_first_edit(tmp_path):
    tokens = Tokens(load_tokens(BUNDLED).tokenizer, max_length=24)
    long = "In Spain the story goes on and on " * 9 + "and the capital is"
    rows = [FRANCE, {"subject": "Spain", "prompt": long, "target_new": "Rome"}, YEN | {"subject": "currency"}]
    rows.append({"subject": "Italy", "prompt": "Italy is", "target_new": "old", "target_old": "word " * 40})
    path = lines(tmp_path / "own.jsonl", *rows)
    skipping = JSONLines(path, bad_rows="skip", num_edits=2)
    with pytest.warns(UserWarning, match="records cannot be used"):
        skipping.fit(tokens)
    assert [request.subject for request in skipping.requests] == ["France", "currency"]
    (left_out,) = skipping.summary()["records"]["left_out"]
    assert left_out["line"] == 2
    assert len(left_out["reason"]) < 250
    with pytest.raises(
        UserError, match=r"line 2: `prompt` and target .* tokens long(.|\n)*line 4: `target_old`: the tar"
    ):
        JSONLines(path, num_edits=None).fit(tokens)


def test_requests_a_method_cannot_write_are_reported_before_the_first_edit(tmp_path, capsys):
    path = lines(tmp_path / "own.jsonl", {key: FRANCE[key] for key in ("subject", "prompt", "target_new")})
    code, found = check(tmp_path, path, "data=jsonl", "method=kn")
    assert code == 2
    assert "give the record `target_old`" in found["rejected"][0]["reason"]


def test_a_subject_at_the_very_beginning_is_doubtful(tmp_path, tiny):
    stream = JSONLines(lines(tmp_path / "own.jsonl", {"subject": "A", "prompt": "A is", "target_new": "B"}))
    tokens = Tokens(tiny("gpt2").tokens.tokenizer)
    tokens.tokenizer.backend_tokenizer.post_processor = None
    with pytest.warns(UserWarning, match="first token of its text"):
        stream.fit(tokens)


# -- messages ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target_new": 1969}, "`target_new` is expected to be a text, but got 1969"),
        ({"target_new": ["Lyon", "Nice"]}, "`target_new` is expected to be a text, but got ['Lyon', 'Nice']"),
        ({"target_new": None}, "`target_new` is expected to be a text, but got null"),
        ({"subject": True}, "`subject` is expected to be a text, but got True"),
        ({"paraphrases": ["a", 3]}, "`paraphrases[1]` is expected to be a text, but got 3"),
        ({"locality": ["Spain"]}, "`locality[0]` is expected to be an object with a `prompt`, but got 'Spain'"),
        (
            {"locality": [{"prompt": "Spain", "answer": {"a": 1}}]},
            "`locality[0].answer` is expected to be a text, but got {'a': 1}",
        ),
        ({"portability": {"a": 1}}, "`portability` is expected to be a list, but got {'a': 1}"),
        ({"separator": 3}, "`separator` is expected to be a text, but got 3"),
        ({"target_new": " \t"}, "`target_new` is expected to be a non-empty text, but got ' \\t'"),
        ({"target_new": {"str": "Lyon"}}, "`target_new` is expected to be a text, but got {'str': 'Lyon'}"),
        ({"target_old": ["Paris"]}, "`target_old` is expected to be a text, but got ['Paris']"),
        ({"paraphrases": ["a", " "]}, "`paraphrases[1]` is expected to be a non-empty text, but got ' '"),
        ({"references": [""]}, "`references[0]` is expected to be a non-empty text, but got ''"),
        (
            {"locality": [{"prompt": " ", "answer": "a"}]},
            "`locality[0].prompt` is expected to be a non-empty text, but got ' '",
        ),
        (
            {"locality": [{"prompt": "a", "answer": "b", "seperator": ""}]},
            "unknown key 'locality[0].seperator': did you mean 'separator'?",
        ),
        ({"case_id": float("nan")}, "`case_id` is expected to be a whole number or a text, but got nan"),
        ({"subject_start": 1e30}, "`subject_start` is expected to be a whole number, but got 1e+30"),
    ],
)
def test_wrong_types_are_named_by_line_key_and_value(change, reason, tmp_path):
    code, found = check(
        tmp_path, lines(tmp_path / "own.jsonl", YEN | {"subject": "The"}, FRANCE | change), "data=jsonl"
    )
    assert (code, found["rejected"]) == (2, [{"line": 2, "reason": reason}])


def test_doubtful_records_are_reported_and_used(tmp_path, capsys):
    path = lines(tmp_path / "own.jsonl", FRANCE | {"target_new": "Paris "})
    code, found = check(tmp_path, path, "data=jsonl")
    assert code == 0
    assert [row["reason"] for row in found["remarks"]] == [
        "`target_new` 'Paris ' has whitespace at its ends, which is dropped",
        "`target_old` and `target_new` are both 'Paris'",
    ]


def test_a_spread_object_is_one_record_and_a_foreign_byte_spoils_one_line(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(FRANCE, indent=1) + "\n" + json.dumps(YEN, indent=1))
    assert list(read_objects(path)) == [(1, FRANCE), (7, YEN)]
    good = json.dumps(FRANCE).encode()
    path.write_bytes(good + b"\n" + good.replace(b"Lyon", b"Ly\xf6n") + b"\n" + good + b"\n")
    found = list(read_objects(path))
    assert found[1] == (2, "not UTF-8 text: it has the byte 0xf6")
    assert [found[0], found[2]] == [(1, FRANCE), (3, FRANCE)]
    path.write_bytes(b"[" + good.replace(b"Lyon", b"Ly\xf6n") + b",\n" + good + b"]")
    assert list(read_objects(path)) == [(1, "not UTF-8 text: it has the byte 0xf6"), (2, FRANCE)]
    path.write_bytes(good.decode().encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        list(read_objects(path))


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('{"subject": "Ann", "subject": "Bob", "prompt": "Bob is"}', 1, "the key 'subject' occurs twice in one object"),
        ('[{"a": [{"b": 1, "b": 2}]}]', 1, "the key 'b' occurs twice in one object"),
        ('[{"a": 1}]\n[{"a": 2}]', 2, "'[{\"a\": 2}]' follows the end of the array, and is not read"),
        ('{"a": 1} {"a": 2}', 1, "not JSON: '{\"a\": 2}' follows the end of the object"),
        ('{"a": 1},', 1, "not JSON: ',' follows the end of the object"),
        ("null", 1, "expected an object, but got null"),
        ('"text"', 1, "expected an object, but got 'text'"),
    ],
)
def test_nothing_in_a_file_is_lost_without_a_word(content, line, reason, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(content)
    assert (line, reason) in list(read_objects(path))


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"target_old": "lyon"}, "`target_old` 'lyon' and `target_new` 'Lyon' differ only in case or Unicode form"),
        ({"target_old": "\uff2cyon"}, "differ only in case or Unicode form"),
        ({"prompt": "The capital of France is Lyon"}, "ends in `target_new` already"),
        ({"locality": [{"prompt": FRANCE["prompt"], "answer": "Paris"}]}, "`locality[0].prompt` is the edited prompt"),
        ({"prompt": 'A 5" map of France costs "'}, 'the " at the end of the prompt may close an earlier one'),
    ],
)
def test_contradictions_inside_a_record_are_doubtful(change, remark, tmp_path):
    stream = JSONLines(lines(tmp_path / "own.jsonl", FRANCE | change))
    stream.setup()
    assert len(stream.remarks) == 1
    assert remark in stream.remarks[0].reason


@pytest.mark.parametrize(
    ("template", "subject", "prompt", "start", "remarks"),
    [
        ("The capital of {}is", "France ", "The capital of France is", 15, 1),
        ("The capital of{} is", " France", "The capital of France is", 15, 1),
        ("The capital of {} is", "France ", "The capital of France is", 15, 1),
        ("{}, {} is", "France", "France, France is", 0, 1),
        ("France loves {} in", "France", "France loves France in", 13, 0),
        ("{}'s capital is", "France", "France's capital is", 0, 0),
        ("The {} is", "{}", "The {} is", 4, 0),
    ],
)
def test_counterfacts_braces(template, subject, prompt, start, remarks, tmp_path):
    rewrite = {"prompt": template, "subject": subject, "target_new": {"str": "a"}, "target_true": {"str": "b"}}
    path = tmp_path / "cf.json"
    path.write_text(json.dumps([{"requested_rewrite": rewrite}]))
    stream = CounterFact(str(path))
    stream.setup()
    (request,) = stream.requests
    assert (request.prompt, request.subject, request.subject_start) == (prompt, subject.strip(), start)
    assert len(stream.remarks) == remarks


CASES = {
    "also_al_counterfact.json": ("counterfact", None),
    "chat_template.jsonl": ("jsonl", None),
    "int_target.jsonl": ("jsonl", "line 1: `target_new` is expected to be a text, but got 1969"),
    "knowedit_wikicf.json": ("knowedit", None),
    "locality_str.jsonl": ("jsonl", "line 1: `locality[0]` is expected to be an object"),
    "long_prompt.jsonl": ("jsonl", "line 2: `prompt` and target"),
    "null_target.jsonl": ("jsonl", "line 1: `target_new` is expected to be a text, but got null"),
    "overwrite.jsonl": ("jsonl", "left out: line 2: its subject 'France' is that of line 1"),
    "same_subject.jsonl": ("jsonl", "left out: line 3: its subject 'France' is that of line 1"),
    "subject_trailing_blank.jsonl": ("jsonl", "doubtful: line 1: `subject` 'France ' has whitespace"),
    "target_list.jsonl": ("jsonl", "line 1: `target_new` is expected to be a text, but got ['Lyon', 'Nice']"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="these files are not part of the project")
@pytest.mark.parametrize("name", CASES)
def test_given_files(name, tmp_path, capsys):
    data, said = CASES[name]
    check(tmp_path, SHARED / "cases" / name, f"data={data}")
    shown = capsys.readouterr().out
    assert said in shown if said else "line" not in shown


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of the project")
@pytest.mark.parametrize(("data", "file"), [("counterfact", "counterfact_2000.json"), ("zsre", "zsre_1000.json")])
def test_published_data_are_cut_as_before(data, file):
    reader = {"counterfact": CounterFact, "zsre": ZsRE}[data]
    stream = reader(path=str(SHARED / "data" / file), num_edits=None, bad_rows="skip", unique_subjects=False)
    stream.setup()
    for request in stream.requests:
        assert request.subject_start == request.prompt.index(request.subject)
        pairs = [(request.prompt, request.target_new, request.pair())]
        pairs += [
            (p, request.target_new, q) for p, q in zip(request.paraphrases, request.paraphrase_pairs(), strict=True)
        ]
        pairs += [(probe.prompt, str(probe.answer), probe.pair()) for probe in request.locality]
        for prompt, target, pair in pairs:
            assert (pair.context, pair.continuation) == (prompt.rstrip(), " " + target.strip())
