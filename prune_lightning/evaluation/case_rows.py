"""Checks per-case rows of measurements, writes them as JSON lines, and bootstraps their means."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from prune_lightning.errors import UserError
from prune_lightning.json_files import nan_to_null
from prune_lightning.metrics.bootstrap import Floats, resampled_means

Rows = Sequence[Mapping[str, Any]]
Keys = dict[str, set[tuple[str, int]]]


class CaseRows:
    """Collects the rows of each measurement at each count, one per task and case.

    Args:
        path: JSONL file, written anew: a line is a row with ``num_requests`` and ``measurement`` in front. ``None``
            for no file, as in all processes but the first.
        max_mb: Size of the file in MB from which on no further rows are written; ``None`` for no limit.
        known: Tasks and cases that each measurement had rows of on the unedited model, if they were taken before.
        keep: A run that is resumed: rows in the file of 1 to ``keep`` edits stay.

    Attributes:
        left_out: Number of rows that were not written because of ``max_mb``.
    """

    def __init__(
        self, path: Path | None, max_mb: float | None = None, known: Keys | None = None, keep: int = 0
    ) -> None:
        self.path, self.max_mb = path, max_mb
        self.known: Keys = known if known is not None else {}
        self.left_out = 0
        self._written = 0
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(path) if 0 < line["num_requests"] <= keep] if keep else []
            path.write_text("", "utf-8")
            self._append(path, kept)

    def add(self, measurement: str, num_requests: int, rows: Rows, asked: Collection[int] | None = None) -> None:
        """Add rows.

        Args:
            measurement: Name of the measurement.
            num_requests: Edits written so far.
            rows: Its rows.
            asked: The cases that were requested; ``None`` for a measurement with its own items.

        Raises:
            UserError: A case occurs twice, or a case of the baseline is missing.
        """
        keys = [(str(row.get("task", "")), int(row["case"])) for row in rows]
        found = set(keys)
        if len(found) != len(keys):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise UserError(f"{measurement} after {num_requests} edits has more than one row of {_named(twice)}")
        before = self.known.setdefault(measurement, found)
        missing = sorted(key for key in before - found if asked is None or key[1] in asked)
        if missing:
            raise UserError(f"{measurement} after {num_requests} edits has no row of {_named(missing)}, but had before")
        if self.path and rows:
            self._write(self.path, measurement, num_requests, rows)

    def retain(self, counts: Collection[int]) -> None:
        """Remove the rows of all other counts, which were or will be evaluated again."""
        if self.path:
            kept = [line for line in _lines(self.path) if line["num_requests"] in counts]
            self.path.write_text("", "utf-8")
            self._written = 0
            self._append(self.path, kept)

    def _write(self, path: Path, measurement: str, num_requests: int, rows: Rows) -> None:
        head = {"num_requests": num_requests, "measurement": measurement}
        self._append(path, [nan_to_null({**head, **row}) for row in rows])

    def _append(self, path: Path, lines: Rows) -> None:
        with path.open("a", encoding="utf-8") as file:
            for row in lines:
                line = json.dumps(row, ensure_ascii=False) + "\n"
                size = len(line.encode())
                if self.max_mb is not None and self._written + size > self.max_mb * 1e6:
                    self.left_out += 1
                else:
                    self._written += size
                    file.write(line)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a file whose writer may have been interrupted."""
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(text)


def _named(keys: Sequence[tuple[str, int]]) -> str:
    named = ", ".join(f"{task or 'case'} {case}" for task, case in keys[:5])
    return named + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def resampled(rows: Rows, names: Collection[str]) -> dict[str, Floats]:
    """Return, by score, one array with its mean over the cases, followed by its means over resampled cases.

    NaN is a failure and counts as 0. A score with an infinite value, such as a perplexity, is left out: its mean is
    infinite. Rows without the score, or with ``None``, are left out, too.

    Args:
        rows: Rows of one measurement; ``weight`` is the number of cases that a row represents, 1 by default.
        names: Names of its scores; those that no row has are left out.
    """
    columns: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        having = tuple(i for i, row in enumerate(rows) if isinstance(row.get(name), (bool, int, float)))
        if having and not any(math.isinf(rows[i][name]) for i in having):
            columns.setdefault(having, []).append(name)
    result: dict[str, Floats] = {}
    for having, together in columns.items():
        values = np.array([[float(rows[i][name]) for name in together] for i in having])
        values = np.where(np.isnan(values), 0.0, values)
        weight = np.array([float(rows[i].get("weight", 1.0)) for i in having])
        means = resampled_means(values, weight)
        whole = (weight @ values) / weight.sum()
        result |= {name: np.concatenate([whole[k : k + 1], means[:, k]]) for k, name in enumerate(together)}
    return result
