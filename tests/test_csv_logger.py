"""`metrics.csv` as one reads it while it is written."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from prune_lightning.report.csv_logger import StepCSVLogger, StepTable
from prune_lightning.report.tracker import TrackedRun


def rows(path):
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_every_call_is_on_disk_and_shares_the_row_of_its_step(tmp_path):
    logger, path = StepCSVLogger(TrackedRun(tmp_path, "a run")), tmp_path / "metrics.csv"
    logger.log_metrics({"loss": 1.5}, step=0)
    assert rows(path) == [{"step": "0", "loss": "1.5"}]
    logger.log_metrics({"loss": torch.tensor(float("nan"))}, step=1)
    assert rows(path)[1:] == [{"step": "1", "loss": "nan"}]
    logger.log_metrics({"norm": math.inf}, step=1)  # a new column, after a row was written
    logger.log_metrics({"norm": 2.0, "loss": 0.1}, step=3)
    assert rows(path) == [
        {"step": "0", "loss": "1.5"},
        {"step": "1", "loss": "nan", "norm": "inf"},
        {"step": "3", "norm": "2.0", "loss": "0.1"},
    ]
    assert path.read_text().splitlines()[0] == "step,loss,norm"
    logger.log_metrics({"norm": 4.0})
    assert rows(path)[-1] == {"step": "4", "norm": "4.0"}


def test_a_row_grows_in_place(tmp_path):
    table = StepTable(tmp_path / "metrics.csv")
    table.add(0, {"a": 1.0, "b, quoted": 2.0})
    for step in (1, 2):
        table.add(step, {"b, quoted": 0.1 + 0.2})
        table.add(step, {"a": 5})
    assert rows(table.path)[1:] == [{"step": s, "a": "5", "b, quoted": "0.30000000000000004"} for s in ("1", "2")]


def test_steps_are_in_order_and_nothing_is_overwritten(tmp_path):
    table = StepTable(tmp_path / "metrics.csv")
    for step, values in ((1, {"a": 1}), (4, {"a": 4}), (0, {"a": 0}), (1, {"b": 1}), (4, {"a": 5}), (0, {"a": 0})):
        table.add(step, values)
    expected = [("0", {"a": "0"}), ("1", {"a": "1", "b": "1"}), ("4", {"a": "4"}), ("4", {"a": "5"})]
    assert rows(table.path) == [{"step": step} | values for step, values in expected]
    table.add(9, {"a": 9})
    assert rows(table.path)[-1] == {"step": "9", "a": "9"}


@pytest.mark.parametrize("torn", ["", "3,0.5", "\x00\x00", "7"])
def test_a_resumed_run_keeps_what_it_did_before(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n0,1.0,\n1,nan,2.0\n2,3.0,4.0\n" + torn)
    table = StepTable(path, keep=1)
    kept = [{"step": "0", "a": "1.0"}, {"step": "1", "a": "nan", "b": "2.0"}]
    assert rows(path) == kept
    table.add(0, {"a": 1.0})  # the baseline again
    table.add(2, {"c": 1.0})
    assert rows(path) == [*kept, {"step": "2", "c": "1.0"}]
    assert rows(StepTable(path).path) == []


def test_hyper_parameters_leave_the_metrics_alone(tmp_path):
    logger = StepCSVLogger(TrackedRun(tmp_path, "a run"))
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"method": {"name": "rome"}})
    assert rows(tmp_path / "metrics.csv") == [{"step": "0", "a": "1.0"}]
    assert "rome" in (tmp_path / "hparams.yaml").read_text()
