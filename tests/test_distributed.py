"""Two processes give the weights of one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import distributed_edit
import distributed_fit
import pytest
import torch
from conftest import BUNDLED, ROOT
from safetensors.torch import load_file
from test_train import train

from prune_lightning.export.sources import load_run
from prune_lightning.models.loading import load_language_model


def in_two_processes(script, folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    arguments = [str(ROOT / "tests" / script), str(folder), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # the script's own folder would come first, and not this checkout
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "weights.pt")


@pytest.mark.parametrize(("strategy", "third"), [("ddp", "kn"), ("fsdp2", "rome")])
def test_edits_by_two_processes_give_the_weights_of_one(strategy, third, tmp_path):
    both = in_two_processes("distributed_edit.py", tmp_path, strategy, third)
    if strategy == "fsdp2":
        told = distributed_edit.decoded(load_language_model(BUNDLED), lambda: True)
        assert both.pop("decoded") == [told, told]
        assert any(len(ids) < limit for ids, limit in zip(told, distributed_edit.LIMITS, strict=True))
    alone = distributed_edit.edit(third, tmp_path / "alone")
    original = load_language_model(BUNDLED)
    assert sorted(both) == sorted(alone)
    for name, weight in alone.items():
        change = weight - original.model.get_parameter(name.split()[1]).detach().T
        assert float(change.norm()) > 0.1 or name.startswith("kn"), "KN may leave a layer as it is"
        assert float((both[name] - weight).norm()) < 1e-5 * float(change.norm()) + 1e-6 * float(weight.norm())


SMALL = ["evaluation.miniature.max_items=4", "data.num_edits=4", "method.value.steps=3", "progress=false"]
MEMIT_JOB = ("method=memit", "export=full", *SMALL)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    done = train(f"hydra.run.dir={folder}", *MEMIT_JOB)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_main_job_of_two_processes_leaves_one_run(trainer, one_process, tmp_path):
    two = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = train(f"hydra.run.dir={tmp_path}", *MEMIT_JOB, *two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The run lies in") == 1
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (one_process, tmp_path))
    assert two["final"] == pytest.approx(one["final"], rel=1e-3)
    assert two["control"]["final"] == pytest.approx(one["control"]["final"], rel=1e-3)
    assert two["control"]["curve"][-1]["num_requests"] == 4
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 4
    rows = [len((folder / "cases.jsonl").read_text().splitlines()) for folder in (one_process, tmp_path)]
    assert rows[0] == rows[1] > 4
    exported, expected = (
        load_file(folder / "export" / "full" / "model.safetensors") for folder in (tmp_path, one_process)
    )
    rebuilt = {matrix.name: matrix for matrix in load_run(tmp_path).matrices}
    for name, weight in expected.items():
        assert torch.allclose(exported[name], weight, rtol=0, atol=1e-5 * float(weight.norm())), name
        if name in rebuilt:
            found = rebuilt[name].stored(rebuilt[name].original + rebuilt[name].dense_change())
            assert float((found - weight).norm()) < 1e-5 * float(weight.norm())
    assert len(rebuilt) == 2


def test_the_restraints_have_work_to_do(tmp_path):
    """Otherwise the comparisons below would compare plain training."""
    ways = [distributed_fit.fit("auto", accumulate, tmp_path) for accumulate in ("raw", "restrained", "rect")]
    assert all(not torch.allclose(a["first"], b["first"], rtol=0.01) for a, b in itertools.combinations(ways, 2))


@pytest.mark.parametrize(
    ("strategy", "accumulate"), [("ddp", "raw"), ("ddp", "rect"), ("fsdp2", "raw"), ("fsdp2", "restrained")]
)
def test_two_processes_give_the_weights_of_one(strategy, accumulate, tmp_path):
    both = in_two_processes("distributed_fit.py", tmp_path, strategy, accumulate)
    alone = distributed_fit.fit("auto", accumulate, tmp_path)
    start = distributed_fit.Regression()
    for name, weight in alone.items():
        change = float((weight - getattr(start, name).weight.detach()).norm())
        for run in ("straight", "resumed"):
            assert float((both[run][name] - weight).norm()) < 1e-5 * change, run


def test_what_one_rank_meets_ends_all_of_them(tmp_path):
    both = in_two_processes("distributed_failures.py", tmp_path)
    for result in both:
        assert result["gather"] == [0, 10]
        assert result["broadcast"] == "from 0"
        assert result["all"] == [True, False]
        assert result["map"] == [(2, 0), (4, 1), (6, 0)]
        assert result["zero"].tolist() == [0.0, 0.0]
        assert float(result["large"]) == 100_000
        assert result["sum"].tolist() == [3.0]
        assert result["map fails"][:2] == ("UserError: rank 1: no such fact", True)
        assert result["zero fails"][:2] == ("UserError: rank 0: the disk is full", True)
        assert result["awkward"][:2] == ("RuntimeError: rank 1: Awkward: odd (7)", True)
        assert result["unpicklable"] == (True,)
        assert result["nested"][:2] == ("ZeroDivisionError: rank 1: before the exchange", True)
        assert result["statistics"][:2] == ("OSError: rank 1: the disk of this rank is gone", True)
        assert result["save"][0].startswith("UserError: rank 0: model.second_moments.cache: ")
        assert result["still in step"] == [0, 1]
        assert result["fit nan skip"] == (3, pytest.approx(2e-3), True)
        assert result["fit nan raise"][0].startswith("NonFiniteChange: the update of case ")  # all ranks raise it
        assert result["fit error skip"][:2] == ("UserError: rank 1: this rank alone has no memory left", True)
        assert result["seconds"] < 60
    assert both[0]["fit nan raise"] == both[1]["fit nan raise"]
    assert "on_failing" in both[0]["map fails"][2]  # the other rank's traceback
