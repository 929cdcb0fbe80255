"""Mutation tests: every fault of ``mutants.yaml``, put into a copy of the project, has to make a named test fail.

``python tests/mutants.py`` runs all of them, ``python tests/mutants.py WORD`` those with the word in their name. Each
gets a line with the test that failed. The exit status is 1 if a fault survives, if its text does not occur exactly once
in its file, or if the tests could not run.

Libraries are imported once; each mutant is tested in a fork of the process that has imported them.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    *("pytest", "torch", "lightning", "torchmetrics", "hydra", "peft", "hypothesis", "scipy.stats", "rich.table"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
)
TIMEOUT = 120.0  # seconds; a mutant that hangs has been noticed
NO_FAILURES, FAILURES = 0, 1  # pytest's exit codes; all others mean that the tests did not run


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        name: What is wrong.
        file: Where, from the project's root.
        old: The right text, which the file holds exactly once.
        new: The wrong one.
        tests: Tests of which at least one has to fail, as pytest takes them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def put_into(self, tree: Path) -> None:
        """Write the fault into a copy of the project.

        Raises:
            ValueError: The right text is not there exactly once.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} holds {self.old!r} {text.count(self.old)} times, not once")
        (tree / self.file).write_text(text.replace(self.old, self.new), encoding="utf-8")

    def take_out_of(self, tree: Path) -> None:
        """Put the right text back."""
        shutil.copyfile(ROOT / self.file, tree / self.file)


class Failed:
    """A pytest plugin that remembers the first test that failed."""

    def __init__(self) -> None:
        self.name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Look at one outcome."""
        if report.failed and self.name is None:
            self.name = report.nodeid


def read(path: Path, words: Sequence[str] = ()) -> list[Mutant]:
    """Return the mutants whose name holds one of the words."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    assert len({mutant.name for mutant in mutants}) == len(mutants), "two mutants have one name"
    return [mutant for mutant in mutants if not words or any(word in mutant.name for word in words)]


def copy_project(tree: Path) -> None:
    """Copy what git knows or would know; compiled files are checked by content, as a mutant may be as old and long."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    compileall.compile_dir(tree, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def pytest_in(tree: Path, tests: Sequence[str], answers: multiprocessing.Queue[tuple[int, str | None]]) -> None:
    """Run tests in a copy of the project, in a process of their own."""
    with (tree / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    sys.path[0] = str(tree)
    import pytest

    failed = Failed()
    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tree / 'basetemp'}", *tests], [failed]
    )
    answers.put((int(code), failed.name))


def run(tree: Path, tests: Sequence[str], limit: float = TIMEOUT) -> tuple[int, str | None]:
    """Return pytest's exit code and the first test that failed."""
    answers: multiprocessing.Queue[tuple[int, str | None]] = multiprocessing.Queue()
    process = multiprocessing.Process(target=pytest_in, args=(tree, tests, answers))
    process.start()
    end = time.monotonic() + limit
    while True:
        try:
            answer = answers.get(timeout=0.2)
            break
        except queue.Empty:
            if not process.is_alive():
                answer = -1, None
                break
            if time.monotonic() > end:
                answer = FAILURES, "the time limit"
                break
    if process.is_alive():
        process.join(10)
        process.kill()
    return answer


def verdict(mutant: Mutant, tree: Path) -> tuple[bool, str]:
    """Return whether a mutant was noticed, and by what."""
    try:
        mutant.put_into(tree)
    except (OSError, ValueError) as error:
        return False, f"DOES NOT FIT  {error}"
    try:
        code, failed = run(tree, mutant.tests)
    finally:
        mutant.take_out_of(tree)
    if code == NO_FAILURES:
        return False, "SURVIVED"
    if code != FAILURES:
        lines = (tree / "output.txt").read_text().strip().splitlines()
        return False, f"DID NOT RUN  {lines[-1] if lines else 'the process ended'}"
    return True, f"killed by {failed}"


def main() -> int:
    """Run the mutants, two at a time."""
    parser = argparse.ArgumentParser(description="Run the mutation tests.")
    parser.add_argument("words", nargs="*", help="only mutants whose name holds one of these")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    mutants = read(ROOT / "tests" / "mutants.yaml", arguments.words)
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        importlib.import_module(library)
    multiprocessing.set_start_method("fork")
    start, survivors = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(arguments.workers):
            tree = Path(folder) / str(number) / "project"  # beside it lies nothing that tests would find
            copy_project(tree)
            trees.put(tree)
        if not pass_unmutated(mutants, trees, arguments.workers):
            return 1
        survivors = _all(mutants, trees, arguments.workers)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed in {time.monotonic() - start:.0f} seconds")
    return int(survivors > 0)


def pass_unmutated(mutants: Sequence[Mutant], trees: queue.SimpleQueue[Path], workers: int) -> bool:
    """Return whether all tests pass on the project as it is, which is what makes a failure mean something."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})

    def part(number: int) -> bool:
        tree = trees.get()
        code, failed = run(tree, tests[number::workers], limit=10 * TIMEOUT)
        if code != NO_FAILURES:
            print((tree / "output.txt").read_text())
            print(f"without any mutant the tests do not pass: {failed or code}")
        trees.put(tree)
        return code == NO_FAILURES

    with ThreadPoolExecutor(workers) as pool:
        return all(pool.map(part, range(min(workers, len(tests)))))


def _all(mutants: Sequence[Mutant], trees: queue.SimpleQueue[Path], workers: int) -> int:
    def one(mutant: Mutant) -> bool:
        tree, start = trees.get(), time.monotonic()
        noticed, what = verdict(mutant, tree)
        trees.put(tree)
        print(f"{mutant.name}: {what} ({time.monotonic() - start:.1f} s)", flush=True)
        return noticed

    with ThreadPoolExecutor(workers) as pool:
        return sum(not noticed for noticed in pool.map(one, mutants))


if __name__ == "__main__":
    sys.exit(main())
