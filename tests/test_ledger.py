"""The ledger: a run goes on from it bit for bit, whatever happened to it, and edits come out of it again."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import lightning as L
import pytest
import torch
from conftest import ROOT, quiet_trainer
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_atomic_files import files_up_to
from test_configs import compose
from test_restraint import BASE, RandomEdits, edits, fit
from test_train import train, without_seconds
from torch import nn
from torch.utils.data import DataLoader

from prune_lightning.callbacks import PRUNE, RECT, EditLedger, LowCurvature, SubspaceFilter
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.evaluation.measurement import Measured, Measurement
from prune_lightning.evaluation.retention import Retention
from prune_lightning.export.__main__ import main
from prune_lightning.export.delta import apply_delta
from prune_lightning.export.sources import load_run
from prune_lightning.ledger import Ledger, StepRecord, base_model, edited_run, rebuild, without
from prune_lightning.ledger.sketch import StateSketch, difference, tolerance
from prune_lightning.methods.edit_run import Phase
from prune_lightning.methods.edited_matrix import EditedMatrix
from prune_lightning.models.loading import load_language_model
from prune_lightning.tasks.collapse import bisect_collapses
from prune_lightning.types import EditBatch, EditRequest, LowRankUpdate

EDITS = 70
KILLS = int(os.environ.get("PRUNE_KILLS", "3"))
RUN = (
    "method=alphaedit",
    "restraint=prune",
    "control=false",
    "evaluation=editing",
    "progress=false",
    f"data.num_edits={EDITS}",
    "method.value.steps=3",
)

# Intel's BLAS sums in one order then, whatever the processor and the alignment of memory: bits can be compared.
REPRODUCIBLE = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


# -- a real run ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    done = train(f"hydra.run.dir={folder}", "export=full", *RUN, **REPRODUCIBLE)
    assert done.returncode == 0, done.stderr
    return folder


def num_lines(folder: Path) -> int:
    path = folder / "ledger" / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(folder: Path, lines: int, delay: float, arguments: tuple[str, ...]) -> None:
    """Start or resume a run, and kill it some time after so many steps are written."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | REPRODUCIBLE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while num_lines(folder) < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run had ended before it was killed"


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(straight, tmp_path):
    moments = random.Random(0)
    planned = sorted(moments.sample(range(1, EDITS - 5), KILLS))
    arguments = (f"hydra.run.dir={tmp_path}", *RUN)
    for lines in planned:
        kill_after(tmp_path, max(lines, num_lines(tmp_path) + 1), moments.uniform(0, 0.12), arguments)
        arguments = (f"resume={tmp_path}",)
    done = train(*arguments, **REPRODUCIBLE)
    assert done.returncode == 0, done.stderr
    assert without_seconds(tmp_path) == without_seconds(straight)
    ours, theirs = (Ledger.open(folder / "ledger").lines for folder in (tmp_path, straight))
    assert [line["sketch"] for line in ours] == [line["sketch"] for line in theirs]
    assert [line["checksum"] for line in ours] == [line["checksum"] for line in theirs]
    rebuilt, live = load_run(tmp_path), load_file(straight / "export" / "full" / "model.safetensors")
    for matrix in rebuilt.matrices:
        assert torch.equal(rebuilt.language_model.model.get_parameter(matrix.name), live[matrix.name])
    finals = [json.loads((folder / "summary.json").read_text())["final"] for folder in (tmp_path, straight)]
    assert finals[0] == finals[1]


def test_exports_from_a_run_equal_its_live_weights(straight, tmp_path, monkeypatch, capsys):
    for kind, options in (("full", ()), ("lora", ("--after", "2")), ("delta", ("--after", "2"))):
        words = ["export", str(straight), "--to", str(tmp_path / kind), "--format", kind, *options]
        monkeypatch.setattr(sys, "argv", words)
        main()
        assert f"exported {kind}" in capsys.readouterr().out
    live, full = (load_file(f / "model.safetensors") for f in (straight / "export" / "full", tmp_path / "full"))
    assert live.keys() == full.keys()
    assert all(torch.equal(full[name], live[name]) for name in live)
    base = load_language_model("pkg://prune_lightning.bundled/model").model
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").merge_and_unload()
    apply_delta(base, tmp_path / "delta")
    for name, matrix in edited_run(straight, after=2).module.edited_matrices().items():
        for model in (base, adapted):
            assert torch.allclose(model.get_parameter(name), matrix.parameter, atol=1e-6)
    monkeypatch.setattr(sys, "argv", ["export", str(straight), "--to", str(tmp_path / "x"), "--without", "3,99"])
    with pytest.raises(SystemExit):
        main()
    assert f"there is no edit 99 to take back: there are {EDITS}" in capsys.readouterr().err


def test_a_run_is_rebuilt_as_it_was_after_an_edit_and_without_some(straight):
    requests = [json.loads(line)["request"] for line in (straight / "edits.jsonl").read_text().splitlines()]
    base = edited_run(straight, after=0).module
    for matrix in base.edited_matrices().values():
        assert torch.equal(matrix.weight(), matrix.original())
    at_ten = edited_run(straight, after=10)
    assert at_ten.requests == requests[:10]
    assert (at_ten.module.num_requests, at_ten.module.run.num_steps) == (10, 10)
    same = edited_run(straight, taken_back=range(11, EDITS + 1)).module  # the restraint of each step was one anew
    for name, matrix in at_ten.module.edited_matrices().items():
        assert torch.equal(matrix.weight(), same.edited_matrices()[name].weight())
    fewer = edited_run(straight, after=10, taken_back=[3, 7])
    assert fewer.requests == [r for i, r in enumerate(requests[:10], start=1) if i not in (3, 7)]
    for name, matrix in fewer.module.edited_matrices().items():
        assert not torch.equal(matrix.weight(), at_ten.module.edited_matrices()[name].weight())
    with pytest.raises(UserError, match=f"holds {EDITS} edits"):
        edited_run(straight, after=EDITS + 1)
    with pytest.raises(UserError, match="there is no edit 11 to take back: there are 10"):
        edited_run(straight, after=10, taken_back=[11])
    source = load_run(straight, after=2)
    assert [request.as_dict() for request in source.provenance.requests] == [
        EditRequest.from_dict(request).as_dict() for request in requests[:2]
    ]


# -- undo ---------------------------------------------------------------------------------------------------------
class CaseEdits(RandomEdits):
    """Random updates that depend on the request alone, and are remembered."""

    def compute_update(self, requests):
        generator = torch.Generator().manual_seed(int(requests[0].case_id))
        sides = [torch.randn(32, 1, generator=generator, dtype=torch.float64) for _ in range(2)]
        update = LowRankUpdate(sides[0], sides[1]).to(self.language_model.device)
        return {self.language_model.rewrite_name(1): update}, [{} for _ in requests]

    def matrix(self) -> EditedMatrix:
        (matrix,) = self.edited_matrices().values()
        return matrix


class Keep(L.Callback):
    """Keeps the weight after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.matrix().weight().clone())

    def on_train_end(self, trainer, pl_module):
        pl_module.run.finish()
        self.final = pl_module.matrix().weight().clone()


NEVER = 10**6
# Up to 100 updates of condition 1 in fp64, summed and partly cancelled: a hundred roundings of the largest, with room.
ROUNDING = 1e4 * torch.finfo(torch.float64).eps


def written(tiny, folder, batches, *restraints, snapshot_every=NEVER):
    """Edit; return what keeps the weight after every step and at the end."""
    module, keep = CaseEdits(tiny("llama"), [1]), Keep()
    fit(module, batches, *restraints, keep, EditLedger(folder, snapshot_every=snapshot_every))
    return keep


def fresh(tiny, restraint=None):
    module = CaseEdits(tiny("llama"), [1])
    if restraint:
        restraint.attach(module)
    return module


class Given:
    """Factors of a curvature that do not depend on the model."""

    def factors(self, module, names):
        generator = torch.Generator().manual_seed(0)
        sides = [torch.randn(32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
        scale = 0.8 ** torch.arange(32, dtype=torch.float64)
        return {name: tuple((side * scale) @ side.T for side in sides) for name in names}


RESTRAINTS = {
    "none": lambda: None,
    "prune": lambda: PRUNE(BASE),
    "prune restrained": lambda: PRUNE(BASE, accumulate="restrained"),
    "prune every 3": lambda: PRUNE(BASE, schedule="every_n", every_n=3),
    "prune end": lambda: PRUNE(BASE, schedule="end"),
    "rect": lambda: RECT(0.2),
    "revive": lambda: SubspaceFilter(),
    "low curvature": lambda: LowCurvature(Given(), 0.9),
    "sphere": lambda: SubspaceFilter(sides="input", strength=0.8, unit_rows=True, schedule="every_n", every_n=3),
}


def relative(module, weight):
    """The difference of the weight to another one, relative to the norm of the change."""
    matrix = module.matrix()
    return float((matrix.weight() - weight).norm() / matrix.change.master.norm())


@pytest.mark.parametrize("name", RESTRAINTS)
def test_the_state_after_any_edit_comes_back_within_rounding(name, tiny, tmp_path):
    count, states = (100, 20) if name in ("none", "prune") else (40, 10)
    restraint = RESTRAINTS[name]()
    keep = written(tiny, tmp_path, edits(count), *([restraint] if restraint else []))
    again = RESTRAINTS[name]()
    module = fresh(tiny, again)
    base, ledger = module.matrix().weight().clone(), Ledger.open(tmp_path)
    for step in random.Random(1).sample(range(1, count + 1), states):
        rebuilt = rebuild(module, ledger, step, again.restrain if again else None)
        assert (rebuilt.num_requests, rebuilt.snapshot, rebuilt.replayed) == (step, 0, step)
        assert relative(module, keep.weights[step - 1]) <= ROUNDING, step
        assert rebuilt.difference <= ROUNDING
        assert module.num_requests == step
        kept = module.matrix().weight().clone()
        with base_model(module):
            assert torch.equal(module.matrix().weight(), base)
        assert torch.equal(module.matrix().weight(), kept)
        module.run.restore()
        assert torch.equal(module.matrix().weight(), base)


@pytest.mark.parametrize("name", RESTRAINTS)
def test_a_snapshot_and_the_end_come_back_bit_for_bit(name, tiny, tmp_path):
    restraint = RESTRAINTS[name]()
    given = [restraint] if restraint else []
    module, keep = CaseEdits(tiny("llama"), [1]), Keep()
    fit(module, edits(20), *given, keep, EditLedger(tmp_path, snapshot_every=6))
    ledger = Ledger.open(tmp_path)
    pending = name in ("prune every 3", "prune end", "sphere")  # what the end changes is kept as it was before
    assert [snapshot.step for snapshot in ledger.snapshots.found()] == ([18, 20] if pending else [12, 18])
    again = fresh(tiny)  # no restraint: nothing is computed again
    for step in (snapshot.step for snapshot in ledger.snapshots.found()):
        rebuilt = rebuild(again, ledger, step, finished=False)
        assert (rebuilt.replayed, rebuilt.difference) == (0, 0.0)
        assert torch.equal(again.matrix().weight(), keep.weights[step - 1])
        again.run.restore()
    # Going on from the last step takes no replay: its snapshot is used, or that of an end without changes.
    assert rebuild(again, ledger, finished=False).replayed == 0
    assert torch.equal(again.matrix().weight(), keep.weights[-1])
    assert again.run.phase is Phase.EDITING
    again.run.restore()
    assert str(rebuild(again, ledger)) == "restored after edit 20, bit for bit"
    assert torch.equal(again.matrix().weight(), module.matrix().weight())
    for name_, tensor in module.matrix().state_dict().items():
        assert torch.equal(again.matrix().state_dict()[name_], tensor), name_


class Stop(L.Callback):
    """Fails before step 16."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.run.num_steps == 15:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("name", RESTRAINTS)
def test_a_run_that_stopped_is_restored_without_its_restraint(name, tiny, tmp_path, monkeypatch):
    """What was written is read, bit for bit: updates are added as they were, and corrections are not computed again."""
    # No snapshot is taken to shorten a replay, so that there are only those that the state needs.
    monkeypatch.setattr("prune_lightning.ledger.snapshots.Snapshots.expected_seconds", lambda self, size: math.inf)
    restraint, keep = RESTRAINTS[name](), Keep()
    given = [restraint] if restraint else []
    writing = EditLedger(tmp_path, snapshot_share=1.0)  # also on a disk that is slow today
    with pytest.raises(RuntimeError, match="stopped"):
        fit(CaseEdits(tiny("llama"), [1]), edits(20), *given, keep, Stop(), writing)
    module, ledger = fresh(tiny), Ledger.open(tmp_path).verified()
    rebuilt = rebuild(module, ledger, finished=False)
    assert rebuilt.num_requests == len(keep.weights) == 15
    assert torch.equal(module.matrix().weight(), keep.weights[-1])
    assert str(rebuilt) == "restored after edit 15, bit for bit"


ADD = """
import sys
from safetensors.torch import load_file, save_file
from prune_lightning.types import LowRankUpdate
given = load_file(sys.argv[1])
for name in ("rows", "columns"):
    matrix = given[name] if name == "rows" else given[name].T
    LowRankUpdate(given["left"], given["right"]).add_to(matrix)
    save_file({"sum": matrix.contiguous()}, f"{sys.argv[2]}.{name}")
"""


def test_updates_add_up_to_the_same_bits_on_every_processor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (70, 300))
    weight = torch.randn(70, 300, generator=generator)
    save_file({"left": left, "right": right, "rows": weight, "columns": weight.T.contiguous()}, tmp_path / "given")
    environments = ({}, {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}, {"OMP_NUM_THREADS": "2"})
    for number, environment in enumerate(environments):
        command = [sys.executable, "-c", ADD, str(tmp_path / "given"), str(tmp_path / str(number))]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, check=True)
    sums = [load_file(path)["sum"] for path in sorted(tmp_path.glob("[0-9].*"))]
    assert len(sums) == 6
    assert all(torch.equal(each, sums[0]) for each in sums)
    exact = weight.double() + left @ right.T
    # Five products, their sum and its addition in fp32, against the sizes that are added.
    sizes = weight.double().abs() + left.abs() @ right.abs().T
    assert ((sums[0] - exact).abs() <= 8 * torch.finfo(torch.float32).eps * sizes).all()


def test_a_damaged_end_is_reported(tiny, tmp_path):
    """Otherwise an export would be of the model before its last restraint, without a word."""
    written(tiny, tmp_path, edits(4), PRUNE(BASE, schedule="end"))
    path = tmp_path / "finish.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="what happened when the stream ended is missing"):
        assert Ledger.open(tmp_path).finish_line is None


@pytest.mark.filterwarnings("ignore:.*snapshot.*is damaged")
def test_what_is_read_lies_where_pytorch_would_put_it(tiny, tmp_path):
    """On some processors, products of equal matrices at other addresses have other bits."""
    written(tiny, tmp_path, edits(12), RECT(0.4), snapshot_every=4)
    ledger = Ledger.open(tmp_path)
    steps = [ledger._files.tensors(line, 0) for line in ledger.lines]
    _, state = ledger.snapshots.newest(12, final=True)
    held = [*steps, *state["parts"].values(), state["memory"]]
    addresses = [tensor.data_ptr() % 64 for tensors in held for tensor in tensors.values()]
    assert len(addresses) > 12
    assert set(addresses) == {0}


def test_a_damaged_snapshot_costs_nothing_but_the_replay(tiny, tmp_path):
    keep = written(tiny, tmp_path, edits(12), PRUNE(BASE), snapshot_every=4)
    ledger, restraint = Ledger.open(tmp_path), PRUNE(BASE)
    for path in (ledger.snapshots.final().path, *(snapshot.path for snapshot in ledger.snapshots.found()[1:])):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    module = fresh(tiny, restraint)
    rebuilt = rebuild(module, ledger, restrain=restraint.restrain)
    assert (rebuilt.snapshot, rebuilt.num_requests) == (8, 12)
    assert relative(module, keep.weights[-1]) <= ROUNDING


class Distance(Measurement):
    """An ability that falls with every edit."""

    name = "ability/near"
    tasks: ClassVar = {"near": 0.0}

    def __init__(self, base):
        super().__init__()
        self.base = base

    def jobs(self, model, cases):
        moved = float((model.rewrite_module(1).weight.detach() - self.base).norm())
        return {"near": lambda: Measured({"near": 1 / (1 + moved)})}


def evaluated(measurement, curve, before):
    """Return the evaluation of a stream whose unedited model scored ``before``."""
    retained = Retention()
    retained.decide([measurement], {"ability/near/near": before}, {})
    evaluator = SimpleNamespace(baseline={"ability/near/near": before}, retention=retained)
    return SimpleNamespace(measurements=[measurement], curve=curve, evaluator=evaluator)


def test_the_step_of_a_collapse_is_found_between_two_looks(tiny, tmp_path):
    weights = written(tiny, tmp_path, edits(40)).weights
    module = fresh(tiny)
    measurement = Distance(module.language_model.rewrite_module(1).weight.detach().clone())
    kept = [1.0, *(1 / (1 + float((weight - module.matrix().original()).norm())) for weight in weights)]
    at = next(step for step, value in enumerate(kept) if value <= 0.05)
    scaled = [min(1.0, 0.5 * value / kept[at]) for value in kept]  # half is lost at this very step
    curve = [
        {"num_requests": n, "ability/near/retention": scaled[n]} for n in (0, at - 1 - (at > 3), at + 3, at + 6, 40)
    ]
    evaluation = evaluated(measurement, curve, 2 * kept[at])
    assert bisect_collapses(module, Ledger.open(tmp_path), evaluation, None) == {"ability/near/retention": at}
    assert torch.equal(module.matrix().weight(), weights[-1])


@pytest.mark.parametrize("name", RESTRAINTS)
def test_without_some_edits_is_the_stream_in_which_they_never_were(name, tiny, tmp_path):
    count, kept = (100, 50) if name in ("none", "prune") else (40, 30)
    taken_back = set(random.Random(2).sample(range(1, count + 1), count - kept))
    restraint, other, again = (RESTRAINTS[name]() for _ in range(3))
    written(tiny, tmp_path / "all", edits(count), *([restraint] if restraint else []))
    rest = [batch for number, batch in enumerate(edits(count), start=1) if number not in taken_back]
    expected = written(tiny, tmp_path / "rest", rest, *([other] if other else [])).final
    module = fresh(tiny, again)

    def after_step():
        if again:
            again.after_step(module.run.num_steps)

    left_out = without(module, Ledger.open(tmp_path / "all").steps(module.device), taken_back, after_step)
    module.run.finish()
    assert {record.step for record in left_out} == taken_back
    assert relative(module, expected) <= ROUNDING
    assert module.num_requests == kept


def test_edits_of_one_step_are_taken_back_together(tiny, tmp_path):
    requests = [batch.requests[0] for batch in edits(6)]
    batches = [EditBatch(tuple(requests[i : i + 3])) for i in (0, 3)]
    written(tiny, tmp_path / "ledger", batches)
    with pytest.raises(UserError, match="edits 1 to 3 were written in one step: take back all of them"):
        edited_run(tmp_path, taken_back=[2, 4, 5, 6])
    with pytest.raises(UserError, match="give after=3 or 6, not 4"):
        edited_run(tmp_path, after=4)
    with pytest.raises(UserError, match="names no model and method"):
        edited_run(tmp_path, taken_back=[1, 2, 3])


def test_a_correction_of_many_directions_needs_the_restraint(tiny, tmp_path):
    written(tiny, tmp_path, edits(20), PRUNE(BASE))
    module, ledger = fresh(tiny), Ledger.open(tmp_path)
    with pytest.raises(UserError, match="restrain="):
        rebuild(module, ledger, 20)
    other = PRUNE(BASE + 0.05)
    module = fresh(tiny, other)
    with pytest.raises(UserError, match=r"differs from what was recorded by 0\.\d+ of the change.*other settings"):
        rebuild(module, ledger, 20, other.restrain)


# -- damage -------------------------------------------------------------------------------------------------------
def resume(tiny, folder, batches, *restraints):
    """Resume, and return the module."""
    ledger = Ledger.open(folder).verified()
    module = CaseEdits(tiny("llama"), [1])
    fit(module, batches[len(ledger.lines) :], *restraints, EditLedger(folder, ledger=ledger, snapshot_every=NEVER))
    return module


def damaged(folder: Path, step: int, where: int) -> None:
    """Flip one bit of the tensors of a step."""
    path, line = folder / "steps.data", Ledger.open(folder).lines[step - 1]
    content = bytearray(path.read_bytes())
    content[line["offset"] + where % line["bytes"]] ^= 1
    path.write_bytes(bytes(content))


def truncated(folder):
    path = folder / "steps.data"
    path.write_bytes(path.read_bytes()[: Ledger.open(folder).lines[4]["offset"] + 100])


def flipped_end(folder):
    damaged(folder, 8, -1)


def flipped_header(folder):
    damaged(folder, 4, 9)


def torn_line(folder):
    path = folder / "steps.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def lost_lines(folder):
    path = folder / "steps.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))


def zeros_in_a_line(folder):
    """As a file system may leave a block that was not synced."""
    path = folder / "steps.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:8], b"\0" * len(lines[8]), *lines[9:]]))


def missing_data(folder):
    (folder / "steps.data").unlink()


def interrupted_writes(folder):
    (folder / "snapshot_00000011.safetensors.tmp").write_bytes(b"half")
    (folder / "steps.jsonl.tmp").write_bytes(b"half")
    with (folder / "steps.data").open("ab") as file:
        file.write(b"tensors without a line")


@pytest.mark.filterwarnings("ignore:.*does not fit the last step")
@pytest.mark.parametrize(
    ("damage", "good"),
    [
        (truncated, 4),
        (flipped_end, 7),
        (flipped_header, 3),
        (torn_line, 9),
        (lost_lines, 6),
        (zeros_in_a_line, 8),
        (missing_data, 0),
        (interrupted_writes, 10),
    ],
)
def test_a_damaged_ledger_is_resumed_from_the_last_good_edit(damage, good, tiny, tmp_path):
    expected = written(tiny, tmp_path / "straight", edits(14), PRUNE(BASE)).final
    folder = tmp_path / "run"
    written(tiny, folder, edits(10), PRUNE(BASE))
    damage(folder)
    if damage in (flipped_end, flipped_header):
        with pytest.raises(UserError, match=f"the last good edit is {good}"):
            list(Ledger.open(folder).steps(torch.device("cpu")))
    assert Ledger.open(folder).verified().num_requests == good
    module = resume(tiny, folder, edits(14), PRUNE(BASE))
    assert relative(module, expected) <= ROUNDING
    ledger = Ledger.open(folder).verified()
    again = fresh(tiny)
    rebuild(again, ledger)
    assert torch.equal(again.matrix().weight(), module.matrix().weight())
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == sorted(path.name for path in (tmp_path / "straight").iterdir())


def check_lost(tiny, folder, failing, message, snapshot_every=NEVER):
    """Run on a failing disk, which costs the latest edit at most; resume on one that does not fail."""
    expected = written(tiny, folder / "straight", edits(14), PRUNE(BASE)).final
    run = folder / "run"
    with failing, pytest.raises(UserError, match=message) as raised:
        written(tiny, run, edits(14), PRUNE(BASE), snapshot_every=snapshot_every)
    said = int(str(raised.value).split("The last good edit is ")[1].split(";")[0])
    good = Ledger.open(run).verified().num_requests
    assert said <= good <= said + 1
    assert relative(resume(tiny, run, edits(14), PRUNE(BASE)), expected) <= ROUNDING
    assert Ledger.open(run).verified().num_requests == 14
    return said


@contextmanager
def failing_syncs(monkeypatch, good):
    """Let every sync after so many fail."""
    made, real = 0, os.fsync

    def full(handle):
        nonlocal made
        made += 1
        if made > good:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


NEW = 6  # syncs of a new ledger: three files and their folder


@pytest.mark.parametrize(("snapshot_every", "syncs"), [(NEVER, 2), (1, 4)])  # of a step
@pytest.mark.parametrize("calls", [0, 1, 7, 13, 24, 25])
def test_a_disk_that_cannot_sync_costs_the_latest_edit_at_most(
    calls, snapshot_every, syncs, tiny, tmp_path, monkeypatch
):
    said = check_lost(tiny, tmp_path, failing_syncs(monkeypatch, NEW + calls), "the disk is full", snapshot_every)
    assert said == calls // syncs


@pytest.mark.parametrize("size", [3_000, 8_000, 12_000, 13_000])
def test_a_full_disk_costs_the_latest_edit_at_most(size, tiny, tmp_path):
    """A write that stops in the middle of a file, as in a file system with a limit on the size of a file."""
    assert 0 <= check_lost(tiny, tmp_path, files_up_to(size), "cannot be written") < 14
    assert (tmp_path / "straight" / "steps.jsonl").stat().st_size > size


def test_what_is_no_ledger_of_this_base_is_refused(tiny, tmp_path):
    written(tiny, tmp_path / "ledger", edits(2))
    with pytest.raises(UserError, match="earlier run; resume=RUN continues"):
        Ledger.create(tmp_path / "ledger", {})
    module = CaseEdits(tiny("llama"), [1])
    with torch.no_grad():
        module.language_model.rewrite_module(1).weight[3, 5] += 1e-9
    with pytest.raises(UserError, match="belongs to another base"):
        fit(module, edits(4)[2:], EditLedger(tmp_path / "ledger", ledger=Ledger.open(tmp_path / "ledger")))
    with pytest.raises(UserError, match="belongs to another base"):
        fit(
            CaseEdits(tiny("llama"), [0]),
            edits(4)[2:],
            EditLedger(tmp_path, ledger=Ledger.open(tmp_path / "ledger")),
        )
    path = tmp_path / "ledger" / "base.json"
    content = path.read_text()
    path.write_text(content.replace('"format": 3', '"format": 2'))
    with pytest.raises(UserError, match=r"has format 2 .* this version reads format 3: resume or export"):
        Ledger.open(tmp_path / "ledger")
    path.write_text(content[:-30])
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        Ledger.open(tmp_path / "ledger")
    path.unlink()
    with pytest.raises(UserError, match="holds no ledger"):
        Ledger.open(tmp_path / "ledger")


# -- Lightning's own checkpoints ----------------------------------------------------------------------------------
METHODS = {
    "alphaedit": ("method.value.steps=3", "method.layers=[0]"),
    "memit": ("method.value.steps=3", "method.layers=[0]", "method.accumulate_past_keys=true"),
    "mend": ("method.restart_norm_stats=true",),
    "ultraedit": ("method.rate=3e-4",),
    "lora": ("method.steps=4", "method.keep=true"),
}


def built(name):
    model = load_language_model("pkg://prune_lightning.bundled/model")
    config = compose(f"method={name}", *METHODS[name]).method
    if "contexts" in config:
        config.contexts = {"_target_": config.contexts._target_, "fixed": ["The river. "]}
    return instantiate(config, language_model=model, _convert_="all")


def stream():
    return BundledWorld(num_edits=8, protocol="sequential_batched", batch_size=2)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@pytest.mark.parametrize("name", METHODS)
def test_lightning_resumes_in_the_middle_of_the_stream(name, tmp_path):
    def restraints():
        return [PRUNE(1.5)] if name in ("lora", "mend") else []

    module = built(name)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    quiet_trainer(*restraints(), saving, enable_checkpointing=True).fit(module, datamodule=stream())
    path = tmp_path / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"] == {}
    assert checkpoint["edits"]["num_requests"] == 4
    base = load_language_model("pkg://prune_lightning.bundled/model").model
    for tensor in tensors_in(checkpoint):
        assert not any(torch.equal(tensor.to(p), p) for p in base.parameters() if p.shape == tensor.shape)
    own = [*tensors_in(checkpoint["edits"]["parts"]), *tensors_in(checkpoint["edits"]["memory"])]
    assert path.stat().st_size < sum(tensor.numel() * tensor.element_size() for tensor in own) + 250_000

    resumed = built(name)
    trainer = quiet_trainer(*restraints())
    trainer.fit(resumed, datamodule=stream(), ckpt_path=path, weights_only=True)
    assert (resumed.num_requests, resumed.run.num_steps, trainer.global_step) == (8, 4, 4)
    for weight, matrix in module.edited_matrices().items():
        assert torch.equal(matrix.weight(), resumed.edited_matrices()[weight].weight())
    assert not torch.equal(matrix.weight(), matrix.original())


@pytest.mark.parametrize("steps", [2, 3])
def test_a_checkpoint_holds_for_its_own_model_only(steps, tiny, tmp_path):
    """Also one of the end of the stream, after which only the edits have to be restored."""
    path, loader = tmp_path / f"step={steps}.ckpt", DataLoader(edits(3), batch_size=None)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = RandomEdits(tiny("llama"), [1])
    fit(module, edits(3), PRUNE(BASE), saving, enable_checkpointing=True)
    again = RandomEdits(tiny("llama"), [1])
    quiet_trainer(PRUNE(BASE)).fit(again, loader, ckpt_path=path, weights_only=True)
    for name, matrix in module.edited_matrices().items():
        assert torch.equal(again.edited_matrices()[name].weight(), matrix.weight())
    other = RandomEdits(tiny("llama"), [1])
    with torch.no_grad():
        other.language_model.rewrite_module(1).weight[0, 0] += 1
    with pytest.raises(UserError, match="written for another model"):
        quiet_trainer(PRUNE(BASE)).fit(other, loader, ckpt_path=path, weights_only=True)


# -- size ---------------------------------------------------------------------------------------------------------
class OneMatrix(nn.Module):
    """A matrix of GPT-2 XL's shape under edit, and nothing else."""

    def __init__(self):
        super().__init__()
        weight = 0.02 * torch.randn(6400, 1600, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight + 12 / 3200)  # one singular value of 12 beyond the others
        self.matrices = {"weight": EditedMatrix("weight", self.weight, transposed=True)}
        self.num_requests = 0

    def register_restraint(self, restraint):
        pass

    def feed_back(self, on):
        pass

    def edited_matrices(self):
        return self.matrices


def test_a_hundred_edits_of_gpt2_xl_take_less_than_a_hundredth_of_the_model(tmp_path):
    module, restraint = OneMatrix(), PRUNE()
    restraint.attach(module)
    matrix, ledger = module.matrices["weight"], Ledger.create(tmp_path / "ledger", {})
    generator, sketch = torch.Generator().manual_seed(1), StateSketch(module.matrices)
    for step in range(1, 101):
        matrix.begin_step()
        left, right = (torch.randn(n, 1, generator=generator) for n in (1600, 6400))
        matrix.add(LowRankUpdate(40 * left / left.norm(), right / right.norm()))
        if step < 8 or step == 100:  # corrections of more than a few directions take no room
            restraint.restrain(matrix)
        events, request = {"weight": matrix.journal}, edits(1)[0].requests[0].as_dict()
        ledger.append(StepRecord(step, step, [request], events=events, sketch=sketch.take()))
    ledger.wait()
    assert matrix.withheld.left.shape[1] == 100
    size = sum(path.stat().st_size for path in (tmp_path / "ledger").iterdir())
    assert size < 0.001 * 6.2e9, f"{size / 1e6:.2f} MB"
    taken = sketch.take()["weight"]
    weight = matrix.weight().clone()
    matrix.restore()
    for record in Ledger.open(tmp_path / "ledger").steps(weight.device):
        matrix.replay(record.events["weight"])
    matrix.write()
    restraint.restrain(matrix)
    assert difference(sketch.take()["weight"], taken) <= tolerance(matrix)
    # A hundred roundings of fp32, relative to the change that they add up to.
    assert float((matrix.weight() - weight).norm()) <= 100 * torch.finfo(torch.float32).eps * taken.change_norm
