"""The edits of a run for a page: what was asked, what was written, and what the model says now."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATES = {
    "says": "says the new answer",
    "prefers": "prefers the new answer to the old one",
    "lost": "does not hold",
    "refused": "was not written",
    "replaced": "was replaced by a later edit",
}
"""How an edit stands, the best first but for edits that were not written."""


@dataclass(frozen=True)
class Probe:
    """An answer to a paraphrase or to an unrelated prompt.

    Args:
        prompt: What was asked.
        expected: The answer that is wanted.
        said: What the model says.
    """

    prompt: str
    expected: str
    said: str

    @property
    def right(self) -> bool:
        """Whether the answers are the same."""
        return self.said.casefold() == self.expected.strip().rstrip(".").casefold()


@dataclass(frozen=True)
class EditRow:
    """One edit.

    Args:
        number: Its place in the stream, from 1.
        head: The prompt up to the subject.
        subject: The subject.
        tail: The prompt after the subject.
        old: The old answer: the given one, or else what the unedited model said.
        new: The new answer.
        now: What the model says; ``None`` if it was not asked.
        state: A key of :data:`STATES`; ``None`` if it was not scored.
        as_of: The count at which the state was scored, if it was not at the end.
        paraphrases: Answers to paraphrases.
        locality: Answers to unrelated prompts.
        findings: What the guards found.
    """

    number: int
    head: str
    subject: str
    tail: str
    old: str | None
    new: str
    now: str | None
    state: str | None
    as_of: int | None = None
    paraphrases: list[Probe] = field(default_factory=list)
    locality: list[Probe] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The state in words."""
        return STATES[self.state] if self.state else ""

    @property
    def rank(self) -> int:
        """The place of the state in an order that has the lost edits first."""
        return -list(STATES).index(self.state) if self.state else 1


def read_edits(folder: Path, summary: Mapping[str, Any]) -> list[EditRow]:
    """Return the edits of a run's folder.

    Args:
        folder: Holds ``edits.jsonl`` and ``cases.jsonl``.
        summary: The run's summary.
    """
    last = int(summary.get("num_requests", 0))
    scored, said, before = _from_cases(folder / "cases.jsonl", last)
    findings: dict[int, list[str]] = {}
    for finding in (summary.get("guards") or {}).get("findings", []):
        first, end = finding["edits"]
        for number in range(first, end + 1):
            findings.setdefault(number, []).append(f"{finding['guard']}: {finding['reason']}")
    replaced = {entry["edit"] for entry in (summary.get("records") or {}).get("superseded", [])}
    return [
        _row(line, scored, said.get(case, {}), before.get(case, {}), findings, last, replaced)
        for case, line in enumerate(_lines(folder / "edits.jsonl"))
    ]


Rows = dict[int, dict[str, Any]]


def _from_cases(path: Path, last: int) -> tuple[Rows, Rows, Rows]:
    """Return the latest scores of each case, and the edited and the unedited model's answers."""
    scored: Rows = {}
    said: Rows = {}
    before: Rows = {}
    for row in _lines(path, '"measurement": "stream"', '"measurement": "answers"'):
        count, case = int(row["num_requests"]), int(row["case"])
        if row["measurement"] == "answers":
            if count in (0, last):
                (said if count else before)[case] = row
        elif count and "task" not in row:
            scored[case] = row
    return scored, said, before


def _lines(path: Path, *marks: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file that hold one of some texts; all of them without any."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not marks or any(mark in line for mark in marks):
                with suppress(ValueError):  # the last line of an interrupted run
                    yield json.loads(line)


def _row(
    line: Mapping[str, Any], scored: Rows, said: Mapping[str, Any], before: Mapping[str, Any],
    findings: Mapping[int, list[str]], last: int, replaced: Collection[int],
) -> EditRow:  # fmt: skip
    request, number = line["request"], int(line["num_requests"])
    start = int(request.get("subject_start") or 0)
    end = start + len(request["subject"])
    prompt, new = request["prompt"], request["target_new"]
    score = scored.get(number - 1)
    unrelated = [(probe["prompt"], probe["answer"]) for probe in request["locality"] if probe["answer"]]
    found = findings.get(number, [])
    if line["refused"] and not found:
        found = [str(line["refused"])]
    return EditRow(
        number,
        prompt[:start],
        prompt[start:end],
        prompt[end:],
        request["target_old"] or before.get("now"),
        new,
        said.get("now"),
        "replaced" if number in replaced else _state(line, score),
        None if score is None or score["num_requests"] == last else int(score["num_requests"]),
        [Probe(p, new, s) for p, s in zip(request["paraphrases"], said.get("paraphrases", ()), strict=False)],
        [Probe(p, answer, s) for (p, answer), s in zip(unrelated, said.get("locality", ()), strict=False)],
        found,
    )


def _state(line: Mapping[str, Any], score: Mapping[str, Any] | None) -> str | None:
    """Return how an edit stands, by its latest score or by that right after the edit."""
    if not line["applied"]:
        return "refused"
    if score is not None:
        success, exact = score.get("score/final"), score.get("accuracy/final")
    else:
        success, exact = line["after"]["score"], line["after"]["accuracy"]
    return "says" if exact else "prefers" if success else "lost"
