"""The data check: every bad record, by line, and what the good ones lack."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED
from test_datasets import CASES, HALLUEDITBENCH, QAEDIT, RIPPLEEDITS, WIKIBIGEDIT, write_csv
from test_fuzz import command_line
from test_records import KNOWEDIT

GOOD = {"subject": "Ann", "prompt": "Ann plays the", "target_new": "oboe"}


def test_lists_every_bad_record_and_counts_the_others(tmp_path, capsys):
    rows = [
        GOOD,
        GOOD | {"subject": "ann", "prompt": "ann sings"},
        *({**GOOD, "subject": f"Bob{i}"} for i in range(30)),
    ]
    rows.append(GOOD | {"paraphrases": ["On stage Ann plays the"], "target_old": "harp", "case_id": "[/b]x"})
    rows.append(GOOD | {"subject": "[/bold]\u001b[31m", "locality": [{"prompt": "Cid plays the", "answer": "drum"}]})
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"subject": "\\ud800"}\n{cut')
    code = command_line(tmp_path / "run", "experiment=check", "data=jsonl", f"data.path={path}")
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err == "error: 33 of 36 records cannot be used; they are listed above\n"
    bad = [*range(3, 33), 34, 35, 36]
    assert [line.split(":")[0] for line in shown.out.splitlines() if line.startswith("line ")] == [
        f"line {number}" for number in bad
    ]
    assert "\u001b" not in shown.out
    found = json.loads((tmp_path / "run" / "check.json").read_text())
    assert [row["line"] for row in found["rejected"]] == bad
    assert list(found["counts"].values()) == [36, 3, 33, 2, 2, 2, 3, 0, 0, 1]
    assert (tmp_path / "run" / "error.txt").read_text().startswith("33 of 36")


def test_good_data_end_with_0(tmp_path, capsys):
    assert command_line(tmp_path / "run", "experiment=check", "data.num_edits=7") == 0
    counts = json.loads((tmp_path / "run" / "check.json").read_text())["counts"]
    assert counts["usable"] == counts["records"] > 1000
    assert (counts["unusable"], counts["without old target"], counts["taken by a run"]) == (0, 0, 7)
    assert "taken by a run" in capsys.readouterr().out


def counts_of(folder, data, path):
    assert command_line(folder, "experiment=check", f"data={data}", f"data.path={path}") == 0
    return list(json.loads((folder / "check.json").read_text())["counts"].values())


@pytest.mark.parametrize(
    ("data", "rows", "counts"),
    [
        ("wikibigedit", WIKIBIGEDIT, [2, 2, 0, 0, 2, 0, 0, 0, 0, 2]),
        ("qaedit", [QAEDIT], [1, 1, 0, 0, 1, 0, 0, 0, 0, 1]),
        ("mquake", CASES, [5, 5, 0, 1, 0, 5, 5, 3, 6, 4]),  # two cases share an edit
        ("rippleedits", [RIPPLEEDITS], [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]),
        ("hallueditbench", [HALLUEDITBENCH], [1, 1, 0, 0, 0, 0, 0, 1, 5, 1]),
        ("knowedit", [KNOWEDIT], [1, 1, 0, 0, 0, 1, 0, 0, 0, 1]),
    ],
)
def test_every_data_set_is_counted(data, rows, counts, tmp_path):
    path = tmp_path / ("rows.csv" if data == "hallueditbench" else "rows.json")
    if path.suffix == ".csv":
        write_csv(path, *rows)
    else:
        path.write_text(json.dumps(rows))
    assert counts_of(tmp_path / "run", data, path) == counts


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of the project")
@pytest.mark.parametrize(
    ("data", "file", "counts"),
    [
        ("wikibigedit", "wikibigedit_1000.json", [1000, 1000, 0, 4, 1000, 0, 0, 0, 0, 100]),
        ("qaedit", "qaedit_500.json", [500, 500, 0, 7, 500, 0, 0, 0, 0, 100]),
        ("mquake", "mquake_hard_100.json", [400, 400, 0, 153, 0, 0, 400, 100, 200, 100]),
    ],
)
def test_published_files_are_counted(data, file, counts, tmp_path):
    assert counts_of(tmp_path / "run", data, SHARED / "data" / file) == counts


@pytest.mark.parametrize("text", ["", "[]", " \n \n"])
def test_empty_files_are_an_error(text, tmp_path, capsys):
    (tmp_path / "empty").write_text(text)
    arguments = ("experiment=check", "data=zsre", f"data.path={tmp_path / 'empty'}")
    assert command_line(tmp_path / "run", *arguments) == 2
    assert capsys.readouterr().err == "error: the data hold no record\n"
