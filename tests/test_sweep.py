"""Sweeps by the local launcher of submitit, resumed by the same command; a refused job leaves a run as it was."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from test_train import train

QUICK = ("data.num_edits=2", "evaluation=editing", "control=false", "method.value.steps=2")


def test_a_sweep_in_processes_of_their_own_is_skipped_once_complete(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = ("-m", "experiment=sweep", "hydra/launcher=local", "restraint=none", *QUICK)
    written = []
    for _ in range(2):
        done = train(*command, f"hydra.sweep.dir={tmp_path}")
        assert done.returncode == 0, done.stderr
        written.append((tmp_path / "rome-none-0" / "summary.json").read_bytes())
    assert json.loads(written[0])["restraint"] == "none"
    assert written[0] == written[1]
    refused = train(*command, f"hydra.sweep.dir={tmp_path}", "method.layers=[1]")
    assert refused.returncode == 2
    assert "a run of the sweep failed" in refused.stderr
    assert "method.layers=[0], not [1]" in (tmp_path / "rome-none-0" / "error.txt").read_text()


def test_a_task_of_slurm_has_its_resources_and_is_queued_again_after_its_time_limit(tmp_path, monkeypatch):
    """What the launcher hands to `sbatch`, with a cluster of which only the commands are there."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = pytest.importorskip("submitit.slurm.slurm")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["experiment=sweep", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.job.name=edit"]
        config = compose("train", [*overrides, f"hydra.sweep.dir={tmp_path}"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    launcher = instantiate(config.hydra.launcher)
    launcher.setup(hydra_context=None, task_function=None, config=config)
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
    assert config.resume == "auto"


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
