"""Reads what Weights & Biases writes offline: a LevelDB log of protobuf records, behind a header of seven bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 2**15
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[Record]:
    """Yield the records of a `run-ID.wandb`."""
    raw, at, joined = file.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if _BLOCK - at % _BLOCK < 7:  # no header fits into the rest of the block
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        joined += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(joined)
            joined = b""


def offline_run(folder: Path) -> dict:
    """Return what the only offline run below a folder holds.

    Keys: id, name, group, config, summary, history, the step metric of each metric, artifacts and exit code.
    """
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while (found := _content(file))["exit"] is None and time.monotonic() < deadline:
        time.sleep(0.2)  # another process writes the file
    return found


def _content(file: Path) -> dict:
    found: dict = {"config": {}, "summary": {}, "history": [], "axes": {}, "artifacts": {}, "exit": None}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
        if kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            found["config"] |= {item.key: json.loads(item.value_json) for item in update if item.key}
        if kind == "history":
            items = record.history.item
            found["history"].append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        if kind == "summary":
            items = record.summary.update
            found["summary"] |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        if kind == "metric":
            found["axes"][record.metric.name] = record.metric.step_metric
        if kind == "artifact":
            files = [entry.path for entry in record.artifact.manifest.contents]
            found["artifacts"][record.artifact.name] = (record.artifact.type, files)
        if kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
