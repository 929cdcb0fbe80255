"""`resume=auto`: a study is run again with the same command until it is complete."""

from __future__ import annotations

import json

import pytest
from conftest import BUNDLED
from test_train import train

from prune_lightning.ledger import Ledger
from prune_lightning.tasks.arguments import AUTO, full_arguments

SMALL = (
    *("evaluation=editing", "evaluation.counts=[0,1,3]", "method.value.steps=3", "progress=false", "control=false"),
    "restraint=prune",
)


def edits(folder):
    keys = ("case_id", "applied", "num_requests")
    lines = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in keys if key in line} for line in lines]


def test_a_study_is_continued_until_it_is_complete(tmp_path):
    folder = tmp_path / "run"
    command = (f"hydra.run.dir={folder}", f"resume={AUTO}", f"model.path={BUNDLED}", *SMALL)
    first = train(*command, "data.num_edits=1")
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in (folder / "edits.jsonl", folder / "summary.json")}

    again = train(*command, "data.num_edits=1")
    assert again.returncode == 0, again.stderr
    assert "skipped: " in again.stdout
    assert all(path.read_bytes() == content for path, content in before.items())

    (folder / "summary.json").unlink()  # as if it had been killed while it wrote its report: it is run again
    lost = train(*command, "data.num_edits=1")
    assert lost.returncode == 0, lost.stderr
    assert len(edits(folder)) == 1

    longer = train(*command, "data.num_edits=3")
    assert longer.returncode == 0, longer.stderr
    straight = train(f"hydra.run.dir={tmp_path / 'straight'}", "data.num_edits=3", f"model.path={BUNDLED}", *SMALL)
    assert straight.returncode == 0, straight.stderr
    assert edits(folder) == edits(tmp_path / "straight")
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "straight"))
    assert ours["num_requests"] == 3
    assert ours["final"]["edit/counterfact/efficacy_score"] == theirs["final"]["edit/counterfact/efficacy_score"]
    # What was measured at the end of the shorter stream is a point of the curve now, and is kept for another resume.
    for one, other in zip(ours["curve"], theirs["curve"], strict=True):
        assert one.keys() == other.keys()
        known = {key: value for key, value in other.items() if value is not None}
        assert {key: one[key] for key in known} == pytest.approx(known, rel=1e-4, abs=1e-6)
    assert [entry["num_requests"] for entry in ours["curve"]] == [0, 1, 3]
    assert ours["stream"] == theirs["stream"]
    kept = Ledger.open(folder / "ledger").lines[1]["callbacks"]["EditEvaluation"]
    assert [entry["num_requests"] for entry in kept["scores"]] == [1]
    cases = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    assert {case["num_requests"] for case in cases} == {0, 1, 3}


def test_auto_is_no_folder():
    assert full_arguments(["resume=auto", "seed=1"]) == ["resume=auto", "seed=1"]
