"""One job per run folder, and a folder per job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock
from omegaconf import OmegaConf

from prune_lightning.run_lock import FILE, RunLock

TRAIN = [sys.executable, str(ROOT / "train.py")]


def train(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRAIN, *arguments], capture_output=True, text=True, cwd=ROOT, env=os.environ | variables, check=False
    )


@pytest.mark.parametrize(("flag", "setting"), [([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir")])
def test_a_folder_in_use_is_refused_before_anything_is_written(tmp_path, flag, setting):
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / FILE):
        done = train(*flag, f"{setting}={folder}", "ledger=false", "seed=1")
        assert done.returncode == 2
        assert done.stderr == (
            f"error: another job runs in {str(folder)!r}: wait until it ends, or choose another folder by "
            f"{setting}=...\n"
        )
        assert [path.name for path in folder.iterdir()] == [FILE], "nothing of the running job is touched"
    done = train(f"hydra.run.dir={folder}", "seed=a")  # stops after the lock
    assert "seed is expected to be a whole number" in done.stderr
    assert (folder / ".hydra").is_dir()


def test_a_killed_job_leaves_its_folder_free(tmp_path):
    hold = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    words = [sys.executable, "-c", hold + "print(1, flush=True); time.sleep(60)", str(tmp_path / FILE)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "1\n"
        assert "another job runs" in train(f"hydra.run.dir={tmp_path}").stderr
        holder.kill()
    assert "seed is expected to be a whole number" in train(f"hydra.run.dir={tmp_path}", "seed=a").stderr


def test_a_run_releases_its_folder_once_it_has_ended(tmp_path):
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path)}, "runtime": {"output_dir": str(tmp_path)}}})
    lock, other = RunLock(), FileLock(tmp_path / FILE)
    lock.on_run_start(config)
    lock.on_job_start(config, task_function=None)
    lock.on_job_end(config, job_return=None)
    with pytest.raises(TimeoutError):
        other.acquire(blocking=False)
    lock.on_run_end(config)
    with other.acquire(blocking=False):
        pass


@pytest.mark.parametrize(
    ("variables", "locks"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_only_the_first_process_of_a_distributed_run_locks(tmp_path, monkeypatch, variables, locks):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path / "run")}}})
    lock = RunLock()
    lock.on_run_start(config)
    assert (tmp_path / "run").exists() is locks
    lock.on_run_end(config)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = train(f"hydra.run.dir={tmp_path}/file/run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"'{tmp_path}/file/run' cannot be written (Not a directory)" in done.stderr


def test_jobs_started_together_have_a_folder_each(tmp_path):
    # To the millisecond: each waits for the same moment, composes, and stops at its seed.
    start = "import sys, time; time.sleep(max(0, float(sys.argv.pop(1)) - time.time())); "
    words = [sys.executable, "-c", start + "from prune_lightning.cli import main; main()", str(time.time() + 1)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    jobs = [subprocess.Popen([*words, f"seed=job{n}"], cwd=tmp_path, env=environment, stderr=-3) for n in range(3)]
    assert [job.wait() for job in jobs] == [2, 2, 2]
    reasons = [path.read_text().split()[-1] for path in Path(tmp_path, "runs").glob("*/error.txt")]
    assert sorted(reasons) == ["'job0'", "'job1'", "'job2'"]
