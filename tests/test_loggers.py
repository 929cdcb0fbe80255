"""Loggers by configuration: several at once, in a job as an agent of a W&B sweep starts it."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_fuzz import command_line
from wandb.sdk.launch.sweeps import utils as sweeps
from wandb_records import offline_run

from prune_lightning import Editor
from prune_lightning.report.mlflow_logger import EditMLFlowLogger
from prune_lightning.report.tensorboard_logger import EditTensorBoardLogger
from prune_lightning.report.tracker import TrackedRun, Tracker
from prune_lightning.tasks.edit_table import COLUMNS, edit_rows
from prune_lightning.tasks.tracking import hand_over

OPTIONAL = [name for name in ("tensorboard", "mlflow", "trackio") if importlib.util.find_spec(name)]
KEY = "edit/counterfact/efficacy_magnitude"


def agents_command():
    """Return the command of an agent for the first combination of the shipped sweep, put together by W&B itself."""
    config = sweeps.load_sweep_config(str(ROOT / "examples" / "wandb_sweep.yaml"))
    chosen = {"args": {name: {"value": entry["values"][0]} for name, entry in config["parameters"].items()}}
    macros = {
        **sweeps.create_sweep_command_args(chosen),
        "env": [],
        "interpreter": [sys.executable],
        "program": [str(ROOT / config["program"])],
    }
    command = []
    for word in sweeps.create_sweep_command(config["command"]):
        macro = re.fullmatch(r"\$\{(\w+)\}", word)
        command += macros[macro[1]] if macro else [word]
    return config, command


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    config, command = agents_command()
    loggers = ",".join(["csv", "wandb", *OPTIONAL])
    command[command.index("logger=wandb")] = f"logger=[{loggers}]"
    command[command.index("logger.wandb.offline=false")] = "logger.wandb.offline=true"
    small = ["evaluation=editing", "data.num_edits=2", "method.value.steps=2", f"hydra.run.dir={folder / 'run'}"]
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "thesweep",
        "WANDB_RUN_ID": "agentsid",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "TRACKIO_DIR": str(folder / "trackio"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([*command, *small], capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return SimpleNamespace(folder=folder, run=folder / "run", config=config, summary=summary)


@pytest.fixture(scope="module")
def curve(job):
    return {entry["num_requests"]: entry[KEY] for entry in job.summary["curve"]}


def test_a_job_of_a_wandb_sweep_is_the_run_that_the_agent_created(job):
    run = offline_run(job.run)
    assert run["id"] == "agentsid"
    assert (run["config"]["method"], run["config"]["settings"]["restraint"]["base"]) == ("rome", 2)
    goal = job.config["metric"]["name"]
    assert run["summary"][goal] == pytest.approx(job.summary["final"][goal.removeprefix("final/")])


def test_metrics_csv_is_written_beside_other_loggers(job, curve):
    with (job.run / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row[KEY] for row in csv.DictReader(file) if row[KEY]}
    assert {step: float(value) for step, value in rows.items()} == pytest.approx(curve)


def test_tensorboard(job, curve):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(job.run / "tensorboard"))
    found.Reload()
    assert {event.step: event.value for event in found.Scalars(KEY)} == pytest.approx(curve, rel=1e-6)  # fp32
    assert {"plots/editing", "plots/spectra"} <= set(found.Tags()["images"])
    assert "| edit | subject |" in found.Tensors("edits/text_summary")[0].tensor_proto.string_val[0].decode()


def test_mlflow(job, curve, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(job.folder)
    client = MlflowClient(f"sqlite:///{job.folder / 'mlflow.db'}")
    run = client.get_run((job.run / "mlflow_run_id.txt").read_text().strip())
    assert {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, KEY)} == pytest.approx(
        curve
    )
    assert (run.info.status, run.data.params["method"], run.data.params["seed"]) == ("FINISHED", "rome", "0")
    assert run.data.metrics[f"final/{KEY}"] == pytest.approx(job.summary["final"][KEY])
    assert {"edits.csv", "result.csv", "plots"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_trackio(job, curve):
    pytest.importorskip("trackio")
    name = (job.run / "trackio_run_id.txt").read_text().strip()
    script = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        "run = 'prune-lightning', sys.argv[1]; print(json.dumps([S.get_logs(*run), S.get_run_config(*run)]))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(job.folder / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", script, name], capture_output=True, text=True, env=environment, check=True
    )
    rows, config = json.loads(done.stdout.splitlines()[-1])
    assert {row["step"]: row[KEY] for row in rows if KEY in row} == pytest.approx(curve)
    assert config["method"] == "rome"
    (table,) = [row["edits"] for row in rows if "edits" in row]
    assert [row["edit"] for row in table["_value"]] == [1, 2]


def test_tensorboard_hides_the_points_that_a_resumed_run_takes_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for kept, values in ((None, {1: 0.25, 2: 0.5, 3: 0.75}), (1, {2: 5.0})):
        logger = EditTensorBoardLogger(save_dir=str(tmp_path), run=TrackedRun(tmp_path, "a run", kept=kept))
        for step, value in values.items():
            logger.log_metrics({"score": value}, step=step)
        logger.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert {event.step: event.value for event in found.Scalars("score")} == {1: 0.25, 2: 5.0}


def test_mlflow_continues_the_run_of_a_resumed_job(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    loggers = []
    for kept, count in ((None, 2), (2, 3)):
        run = TrackedRun(tmp_path, "a run", kept=kept)
        loggers.append(EditMLFlowLogger(experiment_name="tests", tracking_uri=f"sqlite:///{tmp_path}/db", run=run))
        loggers[-1].log_hyperparams({"num_edits": count, "only here": kept})  # MLflow refuses to change one
        loggers[-1].log_metrics({"score": float(count)}, step=count)
    assert loggers[0].run_id == loggers[1].run_id
    run = loggers[1].experiment.get_run(loggers[0].run_id)
    assert (run.data.params["num_edits"], run.data.metrics["score"], run.info.status) == ("2", 3.0, "RUNNING")
    loggers[1].finalize("success")
    assert loggers[1].experiment.get_run(loggers[0].run_id).info.status == "FINISHED"


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_missing_package_is_one_line(name, tmp_path, capsys, monkeypatch):
    if name == "trackio":
        monkeypatch.setitem(sys.modules, "trackio", None)
    elif name in OPTIONAL:
        pytest.skip("it is installed")
    assert command_line(tmp_path / "run", "data.num_edits=1", f"logger={name}") == 2
    err = capsys.readouterr().err
    line = f"logger.{name} needs a package that is not installed: pip install 'prune-lightning[{name}]'"
    assert err.endswith(f"error: {line}\n")


def test_artifacts_that_the_run_does_not_make_are_refused(tmp_path, capsys):
    arguments = ("data.num_edits=1", "logger=wandb", "logger.wandb.artifacts=[export]")
    assert command_line(tmp_path / "run", *arguments) == 2
    line = "logger.wandb.artifacts: there is no export to upload: set export=full, or leave it out"
    assert capsys.readouterr().err.endswith(f"error: {line}\n")


class Remembering(Tracker):
    """A tracker that remembers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.summary, self.uploaded = {}, []

    def log_summary(self, figures):
        self.summary |= figures

    def log_artifact(self, path, kind):
        self.uploaded.append((path, kind))


def test_answers_of_the_table_are_those_of_the_two_models(tmp_path):
    with Editor("bundled", method="rome", folder=tmp_path / "edits", progress=False) as editor:
        facts = [
            {"subject": "France", "prompt": "The capital of France is", "target_new": "Rome", "target_old": "Paris"},
            {"subject": "Italy", "prompt": "The capital of Italy is", "target_new": "London"},
        ]
        editor.edit(facts)
        lines = [
            {"num_requests": n, "request": r.as_dict(), "after": {"accuracy": True}, "applied": True, "refused": None}
            for n, r in enumerate(editor.edits, start=1)
        ]
        (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        module, file = editor._session.module, tmp_path / "edits.jsonl"
        rows = edit_rows(module, file, [Remembering()], from_base=False)
        assert edit_rows(module, file, [Remembering(max_edits=1)], from_base=False) == rows[:1]
        assert edit_rows(module, file, [Remembering(max_edits=0)], from_base=False) == []
        assert [row[6] for row in edit_rows(module, file, [Remembering()], from_base=True)] == [None, None]
    found = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    assert [(row["answer before"], row["answer after all edits"]) for row in found] == [
        ("Paris", "Rome"),
        ("Rome", "London"),
    ]
    assert [row["old answer"] for row in found] == ["Paris", None]


def test_only_what_is_asked_for_is_uploaded(tmp_path):
    tracker, other = Remembering(artifacts=["ledger"], run=TrackedRun(tmp_path, "a run")), object()
    hand_over([other, tracker], {"final/a": 1.0}, tmp_path)
    assert (tracker.summary, tracker.uploaded) == ({"final/a": 1.0}, [(tmp_path / "ledger", "ledger")])
