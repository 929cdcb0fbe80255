"""Two processes give the weights of one."""

from __future__ import annotations

import subprocess
import sys

import distributed_fit
import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("accumulate", ["raw", "restrained", "rect"])
def test_two_processes_give_the_weights_of_one(strategy, accumulate, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    arguments = [str(ROOT / "tests" / "distributed_fit.py"), str(tmp_path), strategy, accumulate]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    both = torch.load(tmp_path / "weights.pt")
    alone = distributed_fit.fit("auto", accumulate, tmp_path)
    start = distributed_fit.Regression()
    for name, weight in alone.items():
        change = float((weight - getattr(start, name).weight).norm())
        for run in ("straight", "resumed"):
            assert float((both[run][name] - weight).norm()) < 1e-5 * change, run
