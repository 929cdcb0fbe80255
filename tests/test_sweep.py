"""Sweeps by the local launcher of submitit, resumed by the same command; a refused job leaves a run as it was."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from test_train import train

QUICK = ("data.num_edits=2", "evaluation=editing", "control=false", "method.value.steps=2")


def killed(*arguments: str, after: Path) -> list[str]:
    """Start a job, kill it and its processes once a run has logged its second edit, and return the log's lines.

    A step is logged before it enters the ledger, so that one edit at least can be restored.
    """
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    with Popen(command, cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True) as process:
        while not (after.is_file() and after.read_text().count("\n") > 1):
            assert process.poll() is None, "the sweep ended by itself"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    return after.read_text().splitlines()


def test_a_sweep_in_processes_of_their_own_goes_on_where_it_was_killed_and_is_skipped_once_complete(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = ("-m", "experiment=sweep", "hydra/launcher=local", "restraint=none", *QUICK, "data.num_edits=20")
    command, run, written = (*command, f"hydra.sweep.dir={tmp_path}"), tmp_path / "rome-none-0", []
    before = killed(*command, after=run / "edits.jsonl")
    assert len(before) < 20
    for _ in range(2):
        done = train(*command)
        assert done.returncode == 0, done.stderr
        written.append((run / "summary.json").read_bytes())
    assert json.loads(written[0])["restraint"] == "none"
    assert written[0] == written[1]
    lines = (run / "edits.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert lines[0] == before[0], "the first edit was not made again, which would have taken other seconds"
    refused = train(*command, "method.layers=[1]")
    assert refused.returncode == 2
    assert "a run of the sweep failed" in refused.stderr
    assert "method.layers=[0], not [1]" in (run / "error.txt").read_text()


def test_a_run_of_the_local_launcher_sees_the_gpu(tmp_path, monkeypatch):
    """Submitit hides all GPUs from a process that asks for none."""
    launcher = launcher_of("local", tmp_path)
    asked = []
    monkeypatch.setattr(
        "submitit.local.local.start_controller", lambda **options: asked.append(options) or Popen("true")
    )
    monkeypatch.setattr("submitit.local.local.LocalJob.results", lambda job: [None])
    launcher.launch([["method=rome"]], 0)
    assert [options["cuda_devices"] for options in asked] == ["0"]


def launcher_of(name: str, folder: Path, *overrides: str) -> Any:
    """Return a launcher as `experiment=sweep` sets it up."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = ["experiment=sweep", f"hydra/launcher={name}", "hydra.job.name=edit", f"hydra.sweep.dir={folder}"]
        config = compose("train", [*words, *overrides], return_hydra_config=True)
    assert config.resume == "auto"
    HydraConfig.instance().set_config(config)
    launcher = instantiate(config.hydra.launcher)
    launcher.setup(hydra_context=None, task_function=None, config=config)
    return launcher


def test_a_task_of_slurm_has_its_resources_and_is_queued_again_after_its_time_limit(tmp_path, monkeypatch):
    """What the launcher hands to `sbatch`, with a cluster of which only the commands are there."""
    launcher = launcher_of("slurm", tmp_path, "hydra.launcher.partition=gpu")
    slurm = pytest.importorskip("submitit.slurm.slurm")
    made = []
    monkeypatch.setattr(slurm.SlurmExecutor, "affinity", lambda *_: 2)
    monkeypatch.setattr("submitit.AutoExecutor.map_array", lambda executor, *_: made.append(executor._executor) or [])
    launcher.launch([["method=rome"], ["method=memit"]], 0)
    (executor,) = made
    assert executor.max_num_timeout == 3
    lines = executor._make_submission_file_text("COMMAND", "0").splitlines()
    wanted = ["partition=gpu", "time=240", "cpus-per-task=8", "gpus-per-node=1", "mem=64GB", "signal=USR2@120"]
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)
    executor.parameters["map_count"] = 210
    array = executor._make_submission_file_text("COMMAND", "0")
    assert "#SBATCH --array=0-209%32" in array
    assert hasattr(launcher, "checkpoint"), "a task is queued again with the same words, and resume=auto goes on"


def test_a_refused_job_leaves_the_run_as_it_was(tmp_path):
    run = tmp_path / "run"
    assert train(*QUICK, f"hydra.run.dir={run}").returncode == 0
    before = {path.name: path.read_bytes() for path in (run / ".hydra").iterdir()}
    assert sorted(before) == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    there, here = (f"resume={run}",), (*QUICK, "resume=auto", f"hydra.run.dir={run}")
    for resumed, changed, line in (
        (there, "method.value.learning_rate=3", "method.value.learning_rate=0.5, not 3"),
        (here, "restraint=rect", "restraint=prune, not rect"),
        (here, "seed=1", "seed=0, not 1"),
    ):
        refused = train(*resumed, changed)
        assert refused.returncode == 2
        assert line in refused.stderr
        assert {path.name: path.read_bytes() for path in (run / ".hydra").iterdir()} == before
    assert train(*there, "data.num_edits=3").returncode == 0
    assert "data.num_edits=3" in (run / ".hydra" / "overrides.yaml").read_text()
    assert json.loads((run / "summary.json").read_text())["curve"][-1]["num_requests"] == 3
