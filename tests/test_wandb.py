"""Weights & Biases, offline: one run per job, what it is called and what it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from conftest import ROOT
from wandb_records import offline_run

from prune_lightning.report.wandb_logger import EditWandbLogger

SMALL = ["evaluation=editing", "data.num_edits=2", "method.value.steps=2", "progress=false", "logger=wandb"]


def train(*arguments: str) -> None:
    words = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Run history" not in done.stdout + done.stderr  # an offline run says what it found once, in the table


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    shipped = ["-m", "experiment=sweep", "control=true", f"hydra.sweep.dir={folder}"]
    train(*shipped, "seed=0,1", "logger.wandb.artifacts=[ledger,report]", *SMALL)
    return folder


def test_each_job_of_a_sweep_is_a_run_of_its_own(sweep):
    runs = [offline_run(sweep / f"rome-prune-{seed}") for seed in (0, 1)]
    assert runs[0]["id"] != runs[1]["id"]
    for seed, run in enumerate(runs):
        assert run["id"] == (sweep / f"rome-prune-{seed}" / "wandb_run_id.txt").read_text().strip()
        assert run["group"] == sweep.name
        words = "data.num_edits=2, method.value.steps=2"
        assert run["name"] == f"rome + prune on bundled, bundled, seed {seed}, {words}"
        plain = {key: run["config"][key] for key in ("method", "restraint", "model", "data", "seed")}
        assert plain == {
            "method": "rome",
            "restraint": "prune",
            "model": "bundled",
            "data": "bundled",
            "seed": seed,
        }
        assert run["config"]["settings"]["data"]["num_edits"] == 2
        assert run["exit"] == 0, "the run was ended, and as a success"


def test_a_run_holds_its_own_curves_and_those_of_the_control(sweep):
    for seed in (0, 1):
        summary = json.loads((sweep / f"rome-prune-{seed}" / "summary.json").read_text())
        history = offline_run(sweep / f"rome-prune-{seed}")["history"]
        for prefix, curve in (("", summary["curve"]), ("control/", summary["control"]["curve"])):
            for key in ("edit/counterfact/efficacy_score", "edit/counterfact/efficacy_magnitude"):
                logged = {row["num_requests"]: row[prefix + key] for row in history if prefix + key in row}
                assert logged == pytest.approx({scores["num_requests"]: scores[key] for scores in curve}), prefix + key
                assert offline_run(sweep / f"rome-prune-{seed}")["axes"][prefix + key] == "num_requests"


def test_the_summary_holds_the_scores_before_and_after(sweep):
    expected = json.loads((sweep / "rome-prune-0" / "summary.json").read_text())
    found = offline_run(sweep / "rome-prune-0")["summary"]
    for part, scores in (
        ("before", expected["baseline"]),
        ("final", expected["final"]),
        ("control", expected["control"]["final"]),
    ):
        key = "edit/counterfact/efficacy_magnitude"
        assert found[f"{part}/{key}"] == pytest.approx(scores[key])
    assert found["num_requests"] == 2


def test_the_table_of_edits_has_the_answers_before_and_after(sweep):
    (file,) = (sweep / "rome-prune-0").glob("wandb/offline-run-*/files/media/table/edits_*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    edits = [json.loads(line) for line in (sweep / "rome-prune-0" / "edits.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [edit["request"]["prompt"] for edit in edits]
    assert [row["new answer"] for row in rows] == [edit["request"]["target_new"] for edit in edits]
    for row in rows:  # the bundled model knows its world
        assert row["answer before"].removesuffix(".") == row["old answer"]
        assert row["outcome"] == "written"


def test_artifacts_are_logged_on_request(sweep):
    run = offline_run(sweep / "rome-prune-0")
    kind, files = run["artifacts"][f"ledger-{run['id']}"]
    assert kind == "ledger"
    assert {"base.json", "steps.jsonl", "steps.data"} <= set(files)
    assert run["artifacts"][f"report-{run['id']}"] == ("report", ["report.html"])


def test_every_edit_logs_its_restraint_however_short_the_stream(sweep):
    history = offline_run(sweep / "rome-prune-0")["history"]
    assert [row["num_requests"] for row in history if "restraint/num_above" in row] == [1, 2]


def test_a_resumed_job_continues_its_run(sweep):
    folder = sweep / "rome-prune-1"
    before = offline_run(folder)
    (folder / "wandb").rename(folder / "wandb_before")
    train(f"resume={folder}", "data.num_edits=3", "control=false", "logger.wandb.artifacts=[]")
    after = offline_run(folder)
    assert after["id"] == before["id"]
    edited = [row["num_requests"] for row in after["history"] if "edit/update_norm" in row]
    assert edited == [3], "only the new edit is logged again"


def test_a_run_that_was_not_ended_takes_nothing_of_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = [EditWandbLogger(save_dir=str(tmp_path / name), offline=True) for name in ("one", "two")]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for number, logger in enumerate(loggers):  # the first is open when the second begins
        logger.log_metrics({"score": float(number)}, step=number)
    assert wandb.run is None
    loggers[0].finalize("failed")
    loggers[1].finalize("success")
    loggers[1].log_metrics({"late": 1.0}, step=5)  # the report comes after the fit
    loggers[1].close()
    one, two = (offline_run(tmp_path / name) for name in ("one", "two"))
    assert one["id"] != two["id"]
    assert [row["score"] for row in one["history"]] == [0.0]
    assert [row.get("score", row.get("late")) for row in two["history"]] == [1.0, 1.0]
    assert (one["exit"], two["exit"]) == (1, 0)
