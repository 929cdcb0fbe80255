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


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    train("-m", "seed=0,1", f"hydra.sweep.dir={folder}", "ledger=true", *SMALL)
    return folder


def test_each_job_of_a_sweep_is_a_run_of_its_own(sweep):
    runs = [offline_run(sweep / str(seed)) for seed in (0, 1)]
    assert runs[0]["id"] != runs[1]["id"]
    for seed, run in enumerate(runs):
        assert run["id"] == (sweep / str(seed) / "wandb_run_id.txt").read_text().strip()
        assert run["group"] == sweep.name
        assert run["name"] == (f"rome + prune on bundled, bundled, seed {seed}, data.num_edits=2, method.value.steps=2")
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
        summary = json.loads((sweep / str(seed) / "summary.json").read_text())
        history = offline_run(sweep / str(seed))["history"]
        for prefix, curve in (("", summary["curve"]), ("control/", summary["control"]["curve"])):
            for key in ("edit/counterfact/efficacy_score", "edit/counterfact/efficacy_magnitude"):
                logged = {row["num_requests"]: row[prefix + key] for row in history if prefix + key in row}
                assert logged == pytest.approx({scores["num_requests"]: scores[key] for scores in curve}), prefix + key


def test_every_edit_logs_its_restraint_however_short_the_stream(sweep):
    history = offline_run(sweep / "0")["history"]
    assert [row["num_requests"] for row in history if "restraint/num_above" in row] == [1, 2]


def test_a_resumed_job_continues_its_run(sweep):
    folder = sweep / "1"
    before = offline_run(folder)
    (folder / "wandb").rename(folder / "wandb_before")
    train(f"resume={folder}", "data.num_edits=3", "control=false")
    after = offline_run(folder)
    assert after["id"] == before["id"]
    assert max(row["num_requests"] for row in after["history"] if "num_requests" in row) == 3


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
