"""Run the main job on a GPU and write what of its summary says how fast and how well it went.

    python benchmarks/gpu_job.py --json FILE
    python benchmarks/gpu_job.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json FILE -- data=counterfact data.path=FILE

With ``TOY=1``, a few edits on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("phases", "wall_s", "edit_s", "evaluate_s", "evaluate_share", "final", "num_requests", "model", "dtype")


def words(gguf: Path | None, toy: bool, further: list[str]) -> list[str]:
    """Return the command's words; ``further`` ones take the place of those of the same name."""
    chosen = [f"trainer={'cpu' if toy else 'gpu'}", "progress=false", "control=false"]
    if gguf is not None:
        chosen += ["model=smollm2", f"model.path={gguf}", "method=memit", "data.protocol=sequential_batched"]
        chosen += ["data.batch_size=10"]
    if gguf is not None or toy:
        chosen += ["evaluation=editing", f"data.num_edits={4 if toy else 200}"]
    named = {word.partition("=")[0] for word in further}
    return [word for word in chosen if word.partition("=")[0] not in named] + further


def so_far(folder: Path, start: float) -> dict[str, Any]:
    """Return what is kept of a run's summary; of a run that is not complete, its edits and its time so far."""
    if (folder / "summary.json").is_file():
        found = json.loads((folder / "summary.json").read_text())
        return {name: found[name] for name in KEPT if name in found}
    edits = folder / "edits.jsonl"
    count = len(edits.read_text().splitlines()) if edits.is_file() else 0
    return {"complete": False, "num_requests": count, "wall_s": time.monotonic() - start}


def main() -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("further", nargs="*", metavar="OVERRIDE", help="further words of the command, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = words(options.gguf and options.gguf.resolve(), bool(os.environ.get("TOY")), options.further)
        command, start = [sys.executable, str(ROOT / "train.py"), *chosen, f"hydra.run.dir={folder}"], time.monotonic()
        with subprocess.Popen(command, cwd=ROOT) as run:
            code: int | None = None
            while code is None:
                with suppress(subprocess.TimeoutExpired):
                    code = run.wait(timeout=2)
                found = {"arguments": chosen, **so_far(Path(folder), start)}
                if options.json:  # along the way, since a limit of time may end the program
                    options.json.write_text(json.dumps(found, indent=2))
    if code:
        sys.exit(code)
    Console(width=140).print(f"{found['wall_s']:.1f} s: {' '.join(chosen)}", highlight=False)


if __name__ == "__main__":
    main()
