"""Kill runs at random moments, resume each in a process whose memory is laid out differently, and compare.

`python tests/kills.py [--kills 20] [--only NAME]` prints one line per method and restraint. The state with which a
process resumes has to be the one that the killed process had after the same step, bit for bit. With
`MKL_CBWR=COMPATIBLE` what follows has to be equal, too: weights, `edits.jsonl`, scores. Without it, BLAS rounds as the
alignment of its memory happens to be, and what follows may differ by what two uninterrupted runs differ by.

`python tests/kills.py --environments` kills each run three times, and goes on in another numeric environment each time;
then edits are undone and the model is exported in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file

from prune_lightning.export.sources import load_run

ROOT = Path(__file__).resolve().parent.parent
EDITS = 40
RUNS = {
    "rome-prune": ("method=rome", "restraint=prune"),
    "rome-prune_restrained": ("method=rome", "restraint=prune_restrained"),
    "alphaedit-prune": ("method=alphaedit", "restraint=prune"),
    "memit-rect": ("method=memit", "restraint=rect"),
    "memit_past_keys-prune_end": ("method=memit", "method.accumulate_past_keys=true", "restraint=prune_end"),
}
COMMON = (
    "control=false",
    "evaluation=editing",
    "progress=false",
    f"data.num_edits={EDITS}",
    "method.value.steps=3",
    "method.value.learning_rate=3",  # changes so large that the restraint acts from the first edits on
    "method.value.clamp=20",
    "evaluation.counts=[10,20,30]",
    "+callbacks.witness._target_=witness.Witness",
)
ENVIRONMENTS: list[dict[str, str]] = [
    {"MKL_CBWR": "AVX512"},
    {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"OMP_NUM_THREADS": "2"},
]
# Keeps blocks of odd sizes, so that whatever is allocated later lies elsewhere than in another process.
DISTURB = """
import os, random
if seed := os.environ.get("PRUNE_DISTURB"):
    draw = random.Random(int(seed))
    __builtins__["_blocks"] = [bytearray(2 * draw.randrange(1, 20_000) + 1) for _ in range(draw.randrange(50, 500))]
"""
# Writes a hash of the edited weights as each step finds them and as it leaves them.
WITNESS = """
import hashlib, json, os
import lightning as L

class Witness(L.Callback):
    def _write(self, module):
        digest = hashlib.blake2b()
        for _, matrix in sorted(module.edited_matrices().items()):
            digest.update(matrix.weight().contiguous().numpy().tobytes())
        line = {"process": os.getpid(), "step": module.run.num_steps, "weights": digest.hexdigest()}
        with open(os.environ["PRUNE_WITNESS"], "a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._write(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._write(pl_module)
"""
UNDO = """
import sys
from safetensors.torch import save_file
from prune_lightning.ledger import edited_run
_, run, out, after, without = sys.argv
found = edited_run(run, int(after) if after else None, [int(edit) for edit in without.split(",") if edit])
print(found.rebuilt)
save_file({name: matrix.weight().contiguous() for name, matrix in found.module.edited_matrices().items()}, out)
"""


class Runner:
    """Starts runs in processes of their own, each with another layout of memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, 0
        (folder / "sitecustomize.py").write_text(DISTURB)
        (folder / "witness.py").write_text(WITNESS)

    def start(self, run: Path, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        self.seed += 1
        ours = {"PRUNE_DISTURB": str(self.seed), "PRUNE_WITNESS": f"{run}.witness", "PYTHONPATH": str(self.folder)}
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **ours, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def complete(self, run: Path, *command: str, environment: Mapping[str, str] | None = None) -> str:
        process = self.start(run, *command, environment=environment)
        printed, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        return printed


def lines(run: Path) -> int:
    path = run / "ledger" / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(process: subprocess.Popen[str], run: Path, target: int, delay: float) -> bool:
    """Kill a process some time after so many steps are written; return whether it was still running."""
    while lines(run) < target and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    running = process.poll() is None
    if running:
        process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors[-3000:]
    return running


def kill_repeatedly(runner: Runner, run: Path, options: tuple[str, ...], kills: int, draw: random.Random) -> int:
    """Run to the end with kills on the way; return how many there were."""
    done, arguments = 0, (f"hydra.run.dir={run}", *COMMON, *options)
    for target in sorted(draw.sample(range(1, EDITS - 1), min(kills, EDITS - 2))):
        if not kill(runner.start(run, "train.py", *arguments), run, target, draw.uniform(0, 0.15)):
            return done
        done, arguments = done + 1, (f"resume={run}",)
    runner.complete(run, "train.py", *arguments)
    return done


def resumed_otherwise(run: Path) -> list[int]:
    """Return the steps after which a process resumed with weights that the process before it did not have then."""
    seen: dict[int, str] = {}
    found = [json.loads(text) for text in Path(f"{run}.witness").read_text().splitlines()]
    differing = []
    for before, line in pairwise([{"process": None}, *found]):
        if before["process"] != line["process"] and seen.get(line["step"], line["weights"]) != line["weights"]:
            differing.append(line["step"])
        seen[line["step"]] = line["weights"]
    return differing


def restrained(run: Path) -> int:
    """Return how often a restraint has changed a matrix; without that the comparison would show little."""
    found = [json.loads(text) for text in (run / "ledger" / "steps.jsonl").read_text().splitlines()]
    found.append(json.loads((run / "ledger" / "finish.json").read_text()))
    events = [event for line in found for each in line["events"].values() for event in each]
    return sum(kind != "add" and form != "nothing" for kind, form in events)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.original + matrix.dense_change() for matrix in load_run(run).matrices}


def changes(run: Path) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.dense_change() for matrix in load_run(run).matrices}


def largest(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], scale: Mapping[str, float]) -> float:
    return max(float((ours[name] - theirs[name]).norm()) / scale[name] for name in theirs)


def norms(run: Path) -> dict[str, float]:
    return {name: float(change.norm()) for name, change in changes(run).items()}


def logged(run: Path) -> list[dict]:
    found = [json.loads(text) for text in (run / "edits.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def scores(run: Path) -> list[dict]:
    return json.loads((run / "summary.json").read_text())["curve"]


def check_kills(runner: Runner, name: str, kills: int) -> bool:
    """Kill, resume and compare with two uninterrupted runs; print a line."""
    one, two, killed = (runner.folder / part for part in ("one", "two", "killed"))
    for run in (one, two):
        runner.complete(run, "train.py", f"hydra.run.dir={run}", *COMMON, *RUNS[name])
    count = kill_repeatedly(runner, killed, RUNS[name], kills, random.Random(name))
    otherwise = resumed_otherwise(killed)
    same = logged(killed) == logged(one) and scores(killed) == scores(one)
    bits = all(torch.equal(a, b) for a, b in zip(weights(killed).values(), weights(one).values(), strict=True))
    differs, between = (largest(changes(run), changes(one), norms(one)) for run in (killed, two))
    # Without reproducible BLAS: of the size of what two straight runs differ by, or of a hundred roundings of fp32.
    allowed = max(10 * between, 100 * torch.finfo(torch.float32).eps)
    good = (bits and same) if os.environ.get("MKL_CBWR") == "COMPATIBLE" else differs <= allowed
    good = good and not otherwise and restrained(killed) > 0
    report(
        f"{name}: {count} kills, {'ok' if good else 'DIFFERS'}; {restrained(killed)} restraints; resumed states "
        f"{f'differ after {otherwise}' if otherwise else 'bit-equal'}; weights "
        f"{'bit-equal' if bits else f'{differs:.1e}'}, log and scores {'equal' if same else 'differ'}; two "
        f"uninterrupted runs differ by {between:.1e}"
    )
    return good


def check_environments(runner: Runner, name: str) -> bool:
    """Make, resume, undo and export a run in different environments; print a line."""
    run, draw = runner.folder / "run", random.Random(name)
    arguments: tuple[str, ...] = (f"hydra.run.dir={run}", *COMMON, *RUNS[name])
    for target, environment in zip((8, 17, 28), ENVIRONMENTS, strict=False):
        process = runner.start(run, "train.py", *arguments, environment=environment)
        assert kill(process, run, target, draw.uniform(0, 0.15))
        arguments = (f"resume={run}",)
    runner.complete(run, "train.py", *arguments, environment=ENVIRONMENTS[-1])
    otherwise, scale, spread = resumed_otherwise(run), norms(run), []
    for after, without in (("", ""), ("25", ""), ("", "3,17")):
        states = []
        for number, environment in enumerate(ENVIRONMENTS):
            out = runner.folder / f"state{number}"
            runner.complete(run, "-c", UNDO, str(run), str(out), after, without, environment=environment)
            states.append(load_file(out))
        spread.append(max(largest(state, states[0], scale) for state in states))
    exports = []
    for number, environment in enumerate(ENVIRONMENTS[::-1]):
        to = runner.folder / f"export{number}"
        command = ("-m", "prune_lightning.export", str(run), "--to", str(to), "--format", "full")
        runner.complete(run, *command, environment=environment)
        exports.append(load_file(to / "model.safetensors"))
    good = (
        not otherwise
        and restrained(run) > 0
        and spread[0] == 0
        and max(spread) <= torch.finfo(torch.float32).eps ** 0.5
    )
    equal = all(torch.equal(export[key], exports[0][key]) for export in exports for key in export)
    report(
        f"{name}: {'ok' if good and equal else 'DIFFERS'}; {restrained(run)} restraints; resumed states "
        f"{f'differ after {otherwise}' if otherwise else 'bit-equal'}; final weights "
        f"{'bit-equal' if not spread[0] else f'{spread[0]:.1e}'}, after 25 edits within {spread[1]:.1e}, without edits "
        f"3 and 17 within {spread[2]:.1e}; exports {'bit-equal' if equal else 'differ'}"
    )
    return good and equal


def report(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run all; return 1 if anything differs by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", choices=sorted(RUNS), nargs="*", default=list(RUNS))
    parser.add_argument("--environments", action="store_true")
    options = parser.parse_args()
    failed = 0
    for name in options.only:
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        runner = Runner(folder)
        good = check_environments(runner, name) if options.environments else check_kills(runner, name, options.kills)
        failed += not good
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
