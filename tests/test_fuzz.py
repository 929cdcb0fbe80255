"""Whatever a data file or a configuration holds: a clear line and 2, or it works; never a traceback."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prune_lightning.cli import main
from prune_lightning.data.counterfact import CounterFact
from prune_lightning.data.jsonl import JSONLines
from prune_lightning.data.zsre import ZsRE
from prune_lightning.errors import UserError

QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}
KEYS = (
    *("case_id", "subject", "prompt", "target_new", "target_old", "paraphrases", "locality", "requested_rewrite"),
    *("target_true", "str", "paraphrase_prompts", "neighborhood_prompts", "ground_truth", "rephrase_prompt", "answer"),
    *("locality_prompt", "locality_ground_truth", "src", "alt", "answers", "pred", "rephrase", "loc", "loc_ans"),
)
TEXTS = st.one_of(
    st.sampled_from(["Ann", "Ann plays the", "oboe", "", " ", "{}", "{} is", "\ud800", "\u2028", "\x00", "<b>"]),
    st.text(alphabet=st.characters(codec=None), max_size=8),
)
SCALARS = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=6,
)
WHOLE = (
    {"subject": "Ann", "prompt": "Ann plays the", "target_new": "oboe", "target_old": "harp", "paraphrases": ["x"]},
    {
        "requested_rewrite": {
            "prompt": "{} plays the",
            "subject": "Ann",
            "target_new": {"str": "oboe"},
            "target_true": {"str": "harp"},
        },
        "paraphrase_prompts": ["Ann"],
        "neighborhood_prompts": ["Bob"],
    },
    {"subject": "Ann", "src": "Who is Ann?", "alt": "a", "answers": ["b"], "rephrase": "r", "loc": "l", "loc_ans": "m"},
)
# Records that are nearly right: a whole one with some keys replaced, or anything at all.
ROWS = st.one_of(
    st.builds(
        lambda row, changes: row | changes,
        st.sampled_from(WHOLE),
        st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    ),
    VALUES,
)


@st.composite
def files(draw) -> bytes:
    """Return a JSON array or JSONL, sometimes cut off, with bytes that do not belong there, or a digit too many."""
    rows = draw(st.lists(ROWS, max_size=4))
    if draw(st.booleans()):
        text = json.dumps(rows, indent=draw(st.sampled_from([None, 1])))
    else:
        ascii_only = draw(st.booleans())
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    raw = text.encode("utf-8", errors=draw(st.sampled_from(["replace", "surrogatepass"])))
    damage = draw(st.sampled_from(["none", "none", "cut", "bytes", "deep", "digits", "mark"]))
    at = draw(st.integers(0, len(raw)))
    pieces = {"bytes": b"\xff\x00", "deep": b'{"a":' * 20_000, "digits": b"1" * 5000}
    if damage == "cut":
        return raw[:at]
    if damage == "mark":
        return b"\xef\xbb\xbf" + raw
    return raw[:at] + pieces.get(damage, b"") + raw[at:]


@given(files(), st.sampled_from([CounterFact, JSONLines, ZsRE]), st.sampled_from(["fail", "skip"]))
@settings(max_examples=400, **QUICK)
def test_data_files(tmp_path_factory, content, reader, bad_rows):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    stream = reader(path=str(path), bad_rows=bad_rows)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream.setup()
    except UserError:
        return
    for request in stream.requests:  # what passed can be encoded, written and read back
        assert request.subject in request.prompt
        json.dumps(request.as_dict(), ensure_ascii=False, allow_nan=False).encode("utf-8")
        assert all(isinstance(text, str) and text.strip() for text in request.paraphrases)
    assert bad_rows == "skip" or not stream.rejected


def command_line(folder: Path, *arguments: str) -> int:
    """Run the command line in this process; return its exit code."""
    GlobalHydra.instance().clear()
    command = ["train.py", f"hydra.run.dir={folder}", "hydra/job_logging=none", "hydra/hydra_logging=none", *arguments]
    with mock.patch.object(sys, "argv", command):
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


GROUPS = (
    "method",
    "model",
    "data",
    "restraint",
    "evaluation",
    "callbacks",
    "trainer",
    "logger",
    "experiment",
)
PATHS = (
    *GROUPS,
    *("data.path", "data.num_edits", "data.protocol", "data.batch_size", "data.seed", "data.shuffle", "data.bad_rows"),
    *("data.unique_subjects", "seed", "method.layers", "method.value.steps", "restraint.base", "export", "control"),
    *("data.target", "data._target_", "task", "data.num_edit", "+data.x", "~data.seed", "a.b.c", "method.value", ""),
)
WORDS = "rome memit jsonl zsre bundled none null -1 0 1 1e3 true ??? [1,2] [ } single batch / . a=b os.getcwd nan é"
SETTINGS = st.one_of(
    st.sampled_from(WORDS.split()),
    st.sampled_from(["${seed}", "${nowhere}", "${oc.env:NOWHERE}", "~nobody/x", "x" * 300, "", "'", "\\", "\x00"]),
    st.sampled_from(["{a: 1}", "prune_lightning.data.stream.EditStream"]),
    st.text(max_size=5),
)


@given(st.lists(st.tuples(st.sampled_from(PATHS), SETTINGS), min_size=1, max_size=3))
@settings(max_examples=100, **QUICK)
def test_configurations(tmp_path_factory, overrides):
    folder = tmp_path_factory.mktemp("run") / "run"
    arguments = [f"{key}={value}" for key, value in overrides]
    with mock.patch.object(sys, "stderr") as stderr, mock.patch.object(sys, "stdout"):
        code = command_line(folder, "experiment=check", *arguments)
    said = "".join(str(call.args[0]) for call in stderr.write.call_args_list)
    assert code in (0, 2), said
    if code == 2:
        assert "Traceback" not in said
        assert said.splitlines()[0].startswith("error: ")
        assert not folder.exists() or (folder / "error.txt").read_text().strip(), "a run folder says why it is empty"


def test_it_was_tried_as_often_as_it_says():
    tried = sum(test._hypothesis_internal_use_settings.max_examples for test in (test_data_files, test_configurations))
    assert tried >= 500


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b'{"subject": "A\xe2\x80\xa8nn", "prompt": "A\xe2\x80\xa8nn is", "target_new": "x"}', []),
        (b'\xef\xbb\xbf{"subject": "Ann", "prompt": "Ann is", "target_new": "x"}', []),
        (b'{"subject": "Ann", "prompt": "Ann is", "target_new": "x", "paraphrases": "Ann"}', [1]),
        (b'{"subject": "Ann", "prompt": "Ann is", "target_new": "x", "target_old": " "}', [1]),
        (b'{"subject": "Ann", "prompt": "Ann is", "target_new": "\\udc00"}', [1]),
        (b'{"subject": "Ann", "prompt": "Ann is", "target_new": "x", "case_id": [1]}', [1]),
        (b"1" * 5000, [1]),
        (b'{"a":' * 100_000, [1]),
    ],
    ids=["separator", "mark", "letters", "blank", "surrogate", "case_id", "digits", "deep"],
)
def test_what_was_found(content, lines, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    assert [row.line for row in JSONLines(path=str(path)).records() if hasattr(row, "line")] == lines
