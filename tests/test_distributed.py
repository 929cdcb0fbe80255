"""Two processes give the weights of one."""

from __future__ import annotations

import itertools
import subprocess
import sys

import distributed_fit
import pytest
import torch
from conftest import ROOT


def test_the_restraints_have_work_to_do(tmp_path):
    """Otherwise the comparisons below would compare plain training."""
    ways = [distributed_fit.fit("auto", accumulate, tmp_path) for accumulate in ("raw", "restrained", "rect")]
    assert all(not torch.allclose(a["first"], b["first"], rtol=0.01) for a, b in itertools.combinations(ways, 2))


@pytest.mark.parametrize(
    ("strategy", "accumulate"), [("ddp", "raw"), ("ddp", "rect"), ("fsdp2", "raw"), ("fsdp2", "restrained")]
)
def test_two_processes_give_the_weights_of_one(strategy, accumulate, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    arguments = [str(ROOT / "tests" / "distributed_fit.py"), str(tmp_path), strategy, accumulate]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    both = torch.load(tmp_path / "weights.pt")
    alone = distributed_fit.fit("auto", accumulate, tmp_path)
    start = distributed_fit.Regression()
    for name, weight in alone.items():
        change = float((weight - getattr(start, name).weight.detach()).norm())
        for run in ("straight", "resumed"):
            assert float((both[run][name] - weight).norm()) < 1e-5 * change, run
