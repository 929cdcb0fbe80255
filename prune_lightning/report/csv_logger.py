"""`metrics.csv` as a table that can be read while it is written."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from prune_lightning.atomic_files import write_bytes
from prune_lightning.report.tracker import TrackedRun

Row = dict[str, str]


class StepTable:
    """A CSV file with one row per step, in the order of the steps, complete on disk after every call.

    Values logged for the same step share a row. A new column is added on the right. The file never loses data: a row is
    appended or extended in a single write, and any other change is written to a temporary file, which is then renamed.
    An empty cell means not measured. ``nan`` means measured, but not a number.

    Args:
        path: The file.
        keep: Keep the rows of an existing file up to this step; ``None`` starts a new file.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        self.columns = ["step"]
        self._last: Row | None = None
        self._offset = 0  # of the last row
        self._write([] if keep is None else self._read(keep))

    @property
    def last_step(self) -> int:
        """The step of the last row; -1 if there is none."""
        return -1 if self._last is None else int(self._last["step"])

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the row of a step.

        A second, different value of the same name starts a second row for the step, so that no value is lost.

        Args:
            step: The step.
            values: Values by name.
        """
        row = {key: str(v.item() if isinstance(v, Tensor) else v) for key, v in values.items()} | {"step": str(step)}
        known = row.keys() <= set(self.columns)
        if known and step > self.last_step:
            self._put(self.path.stat().st_size, row)
        elif known and self._last is not None and step == self.last_step and _agree(self._last, row):
            self._put(self._offset, self._last | row)
        else:
            rows = self._read()
            place = sum(int(other["step"]) <= step for other in rows)
            if place and int(rows[place - 1]["step"]) == step and _agree(rows[place - 1], row):
                rows[place - 1] |= row
            else:
                rows.insert(place, row)
            self._write(rows)

    def _put(self, offset: int, row: Row) -> None:
        """Write the last row at its place in the file."""
        with self.path.open("r+b", buffering=0) as file:
            file.seek(offset)
            file.write(self._lines([row]))
            file.truncate()
        self._offset, self._last = offset, row

    def _read(self, keep: int | None = None) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]
        rows = [row for row in rows if row.get("step", "").isdigit()]
        return sorted((r for r in rows if keep is None or int(r["step"]) <= keep), key=lambda row: int(row["step"]))

    def _write(self, rows: list[Row]) -> None:
        """Write the whole file."""
        self.columns = list(dict.fromkeys([*self.columns, *(key for row in rows for key in row)]))
        header = self._lines([dict(zip(self.columns, self.columns, strict=True))])
        before = header + self._lines(rows[:-1])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, before + self._lines(rows[-1:]))
        self._offset, self._last = len(before), rows[-1] if rows else None

    def _lines(self, rows: Iterable[Row]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def _agree(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in one.keys() & other.keys())


class StepCSVLogger(Logger):
    """Logs to `metrics.csv`, one row per step, each written as soon as it is logged; see :class:`StepTable`.

    Lightning's ``CSVLogger`` keeps rows in memory, writes a row per call, and deletes the file of a run that is
    resumed.

    Args:
        run: The job. `metrics.csv` and `hparams.yaml` are written to its folder.
    """

    def __init__(self, run: TrackedRun) -> None:
        super().__init__()
        self._folder, self._keep = run.folder, run.kept
        self._table: StepTable | None = None

    @property
    @override
    def name(self) -> str:
        """Empty: the folder identifies the run."""
        return ""

    @property
    @override
    def version(self) -> str:
        """Empty, like the name."""
        return ""

    @property
    @override
    def save_dir(self) -> str:
        """The folder."""
        return str(self._folder)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write values into the row of a step; by default the step after the last row."""
        self._table = self._table or StepTable(self._folder / "metrics.csv", self._keep)
        self._table.add(self._table.last_step + 1 if step is None else step, metrics)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write `hparams.yaml`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_hparams_to_yaml(str(self._folder / "hparams.yaml"), params)
