"""A run as one follows it from outside, is killed, and is resumed."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import train

EDITS = 5
RUN = (
    "restraint=prune",
    "control=false",
    f"data.num_edits={EDITS}",
    "method.value.steps=3",
    "evaluation.counts=[1,3]",
    "evaluation.miniature.max_items=4",
    "progress=false",
)


def steps(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def figures(folder: Path) -> list[dict[str, str]]:
    """What was logged, without what differs from run to run."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v and k != "edit/seconds"} for row in csv.DictReader(file)]


def evaluated(text: str) -> list[str]:
    pattern = r"INFO edit (\d+)/\d+, [\d.]+ (?:edits/s|s per edit), [\d.]+ \w+ left: efficacy \d\.\d\d, retention"
    return re.findall(pattern, text)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, str, float]:
    folder = tmp_path_factory.mktemp("straight")
    began = time.time()
    done = train(f"hydra.run.dir={folder}", *RUN)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr, began


def test_without_a_progress_display_the_lines_of_the_log_go_to_the_terminal(straight):
    folder, stderr, _ = straight
    lines = (folder / "train.log").read_text().splitlines()
    assert [line for line in stderr.splitlines() if " INFO " in line] == lines
    assert evaluated(stderr) == ["1", "3", "5"]
    ended = [line.split(" INFO ")[1].split(":")[0] for line in lines]
    assert [name for name in ended if name in ("load", "baseline", "edit", "report")] == [
        "load",
        "baseline",
        "edit",
        "report",
    ]


def test_phases_sum_to_the_time_from_the_start_of_the_process_to_the_summary(straight):
    folder, _, began = straight
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    phases = summary["phases"]
    assert summary["wall_s"] == pytest.approx(sum(phases.values()), rel=1e-9)
    assert {"start", "load", "baseline", "prepare", "statistics", "edit", "evaluate", "report"} <= set(phases)
    assert {"edit/scores", "edit/restraint", "edit/guards", "edit/ledger", "edit/spectrum"} <= set(phases)
    # Beyond the 2 %: the time it takes to start a process, and the resolution of its age.
    assert summary["wall_s"] == pytest.approx(path.stat().st_mtime - began, rel=0.02, abs=0.2)
    assert phases["other"] < 0.05 * summary["wall_s"]
    assert phases["edit"] >= summary["edit_s"]
    assert phases["evaluate"] + phases["baseline"] >= 0.95 * summary["evaluate_s"]


def test_with_a_progress_display_only_the_file_has_the_lines(straight, tmp_path):
    words = [word for word in RUN if not word.startswith(("progress", "data.num_edits"))]
    done = train(f"hydra.run.dir={tmp_path}", *words, "data.num_edits=1")
    assert done.returncode == 0, done.stderr
    assert evaluated((tmp_path / "train.log").read_text()) == ["1"]
    assert " INFO " not in done.stderr
    assert "✓ load" in done.stderr


def test_a_killed_run_leaves_all_it_wrote_and_is_resumed_there(straight, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={tmp_path}", *RUN]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ledger = tmp_path / "ledger" / "steps.jsonl"
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL
    assert steps(tmp_path)[:4] == [0, 1, 2, 3]
    assert figures(tmp_path)[:4] == figures(straight[0])[:4]
    assert [json.loads(line)["num_requests"] for line in (tmp_path / "edits.jsonl").open()][:3] == [1, 2, 3]
    log = (tmp_path / "train.log").read_text()
    assert evaluated(log)[:2] == evaluated(stderr)[:2] == ["1", "3"]

    done = train(f"resume={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == list(range(EDITS + 1))
    assert figures(tmp_path) == figures(straight[0])
    resumed = (tmp_path / "train.log").read_text()
    assert resumed.startswith(log)
    assert evaluated(resumed.removeprefix(log))[-1] == "5"
    assert "resume" in json.loads((tmp_path / "summary.json").read_text())["phases"]
