"""Kill runs at random moments, resume each in a process whose memory is laid out differently, and compare.

`python tests/kills.py [--kills 20] [--only NAME]` prints one line per method and restraint. With `MKL_CBWR=COMPATIBLE`
everything has to be equal bit for bit. Without it, BLAS rounds as the alignment of its memory happens to be: then the
stored states have to come back bit for bit, and what follows may differ by what two uninterrupted runs differ by.
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
from pathlib import Path

import torch

from prune_lightning.export.sources import load_run
from prune_lightning.ledger import Ledger

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
    "evaluation.counts=[10,20,30]",
)
# Keeps blocks of odd sizes, so that whatever is allocated later lies elsewhere than in another process.
DISTURB = """
import os, random
if seed := os.environ.get("PRUNE_DISTURB"):
    draw = random.Random(int(seed))
    __builtins__["_blocks"] = [bytearray(2 * draw.randrange(1, 20_000) + 1) for _ in range(draw.randrange(50, 500))]
"""


class Runner:
    """Starts runs in processes of their own, each with another layout of memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, 0
        (folder / "sitecustomize.py").write_text(DISTURB)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        self.seed += 1
        environment = {**os.environ, "PRUNE_DISTURB": str(self.seed), "PYTHONPATH": str(self.folder)}
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def complete(self, *arguments: str) -> None:
        process = self.start(*arguments)
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]


def lines(run: Path) -> int:
    path = run / "ledger" / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_repeatedly(runner: Runner, run: Path, options: tuple[str, ...], kills: int, draw: random.Random) -> int:
    """Run to the end with kills on the way; return how many there were."""
    done, arguments = 0, (f"hydra.run.dir={run}", *COMMON, *options)
    planned = sorted(draw.sample(range(1, EDITS - 1), min(kills, EDITS - 2)))
    for target in planned:
        process = runner.start(*arguments)
        while lines(run) < max(target, 1) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.communicate()
        arguments = (f"resume={run}",)
        if process.returncode == 0:
            return done
    runner.complete(*arguments)
    return done


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.original + matrix.dense_change() for matrix in load_run(run).matrices}


def changes(run: Path) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.dense_change() for matrix in load_run(run).matrices}


def relative(one: Path, other: Path) -> float:
    ours, theirs = changes(one), changes(other)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def logged(run: Path) -> list[dict]:
    found = [json.loads(text) for text in (run / "edits.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def scores(run: Path) -> list[dict]:
    return json.loads((run / "summary.json").read_text())["curve"]


def states_of(run: Path) -> dict[int, str]:
    return {snapshot.step: str(snapshot.path) for snapshot in Ledger.open(run / "ledger").snapshots.found()}


def main() -> int:
    """Run all; return 1 if anything differs by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", choices=sorted(RUNS))
    options = parser.parse_args()
    exact, failed = os.environ.get("MKL_CBWR") == "COMPATIBLE", 0
    for name in [options.only] if options.only else RUNS:
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        runner = Runner(folder)
        one, two, killed = (folder / part for part in ("one", "two", "killed"))
        for run in (one, two):
            runner.complete(f"hydra.run.dir={run}", *COMMON, *RUNS[name])
        count = kill_repeatedly(runner, killed, RUNS[name], options.kills, random.Random(name))
        same = logged(killed) == logged(one) and scores(killed) == scores(one)
        bits = all(torch.equal(a, b) for a, b in zip(weights(killed).values(), weights(one).values(), strict=True))
        differs, between = relative(killed, one), relative(two, one)
        # Without reproducible BLAS: of the size of what two straight runs differ by, or of a hundred roundings of fp32.
        allowed = 0.0 if exact else max(10 * between, 100 * torch.finfo(torch.float32).eps)
        good = (bits and same) if exact else differs <= allowed
        failed += not good
        words = "bit-equal" if bits else f"{differs:.1e}"
        sys.stdout.write(
            f"{name}: {count} kills, {'ok' if good else 'DIFFERS'}; weights {words}, log and scores "
            f"{'equal' if same else 'differ'}; two uninterrupted runs differ by {between:.1e}\n"
        )
        sys.stdout.flush()
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
