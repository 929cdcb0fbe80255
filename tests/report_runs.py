"""Folders of finished runs, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_lightning.evaluation.counterfact import CounterFactScores
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.evaluation.shown import shown
from prune_lightning.evaluation.stream import StreamScores

EFFICACY, GENERALIZATION = "edit/counterfact/efficacy_score", "edit/counterfact/generalization_score"
LOCALITY, KEPT = "edit/counterfact/locality_score", "ability/miniature/retention"
CHANGE, FAILED = "spectrum/sigma_max_delta", "edit/counterfact/num_retokenised"
FINAL = {EFFICACY: 0.86, GENERALIZATION: 0.7, LOCALITY: 0.8, KEPT: 0.7, CHANGE: 5.0, FAILED: 0.0, "drift/odd_one": 0.4}
CONTROL = {EFFICACY: 0.83, GENERALIZATION: 0.75, LOCALITY: 0.5, KEPT: 0.2, CHANGE: 50.0, FAILED: 0.0}
WORST = "</pre></script><script>alert(1)</script><img src=x onerror='x'> {{ 7*7 }} \"'&"


def labels() -> dict[str, Any]:
    """Labels as an evaluator gives them."""
    parts = [StreamScores(), CounterFactScores(), MiniatureAbilities(max_items=1)]
    return {part.name: shown(part) for part in parts}


def interval(value: float) -> list[float]:
    return [value - 0.05, value + 0.05]


def measured(final: dict[str, float], n: int) -> dict[str, Any]:
    curve = [{"num_requests": t, **{k: v * t / 20 for k, v in final.items()}} for t in (0, 5, 10, 20)]
    bounds = [{"num_requests": e["num_requests"], **{k: interval(e[k]) for k in (EFFICACY, LOCALITY)}} for e in curve]
    return {
        "final": final,
        "curve": curve,
        "intervals": bounds,
        "num_cases": dict.fromkeys((EFFICACY, GENERALIZATION, LOCALITY, KEPT), n),
    }


def summary(num_edits: int = 3, n: int = 100, control: bool = True, **further: Any) -> dict[str, Any]:
    """The summary of a run of ROME with PRUNE."""
    found = {
        "method": "rome",
        "restraint": "prune",
        "model": "bundled",
        "model_path": "pkg://here/model",
        "data": "bundled",
        "seed": 0,
        "protocol": "sequential",
        "num_requests": num_edits,
        "labels": labels(),
        "baseline": {EFFICACY: 0.0, LOCALITY: 1.0, KEPT: 1.0, CHANGE: 0.0},
        "command": "python train.py seed=0",
        "overrides": ["seed=0"],
        "date": "2026-03-01 12:00",
        "versions": {"torch": "2.13"},
        "original_sigma_max": {"w": 2.5},
        "control": None,
        **measured(FINAL, n),
    }
    if control:
        differences = {EFFICACY: [0.03, -0.02, 0.08], KEPT: [0.5, 0.4, 0.6], GENERALIZATION: [-0.05, -0.09, -0.01]}
        found["control"] = {"differences": differences, **measured(CONTROL, n)}
    return {**found, **further}


def edit(number: int, text: str = "", probes: int = 2, **further: Any) -> dict[str, Any]:
    """A line of edits.jsonl."""
    prompt = f"The capital of Land {number} is{text}"
    probe = {"prompt": f"The capital of Elsewhere {number} is{text}", "answer": f"Oslo{text}"}
    return {
        "num_requests": number,
        "request": {
            "subject": f"Land {number}",
            "subject_start": 15,
            "prompt": prompt,
            "target_new": f"Rome{text}",
            "target_old": f"Paris{text}",
            "paraphrases": [f"Land {number} is governed from{text}"] * probes,
            "locality": [probe] * probes,
        },
        "after": {"score": True, "accuracy": True},
        "applied": True,
        "refused": None,
        **further,
    }


def stream(number: int, count: int, success: float, exact: float) -> dict[str, Any]:
    """A line of cases.jsonl about how an edit holds."""
    row = {"num_requests": count, "measurement": "stream", "case": number - 1}
    return row | {"score/final": success, "accuracy/final": exact}


def answers(number: int, count: int, now: str | None, paraphrase: str = "Rome", other: str = "Oslo") -> dict[str, Any]:
    """A line of cases.jsonl about what the model says."""
    row = {"num_requests": count, "measurement": "answers", "case": number - 1, "now": now}
    return row | {"paraphrases": [paraphrase], "locality": [other]}


def folder(path: Path, edits: list[dict[str, Any]], cases: list[dict[str, Any]]) -> Path:
    """Write the files of a run."""
    for name, lines in (("edits.jsonl", edits), ("cases.jsonl", cases)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
