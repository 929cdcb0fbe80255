"""`train.py` as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

SMALL = ["evaluation.miniature.max_items=8", "data.num_edits=3", "method.value.steps=4", "progress=false"]
SCORES = {
    *(
        f"edit/counterfact/{kind}_{form}"
        for kind in ("efficacy", "generalization", "locality")
        for form in ("score", "accuracy")
    ),
    *(f"ability/miniature/{name}" for name in ("reasoning", "nli", "qa", "summarization", "perplexity", "retention")),
    "spectrum/sigma_max_delta",
    "spectrum/condition_number",
}


def train(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=os.environ | environment)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]


def without_seconds(folder: Path) -> list[str]:
    return [json.dumps({k: v for k, v in line.items() if k != "seconds"}) for line in lines(folder)]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("default")
    done = train(f"hydra.run.dir={folder}", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_leaves_what_other_programs_rely_on(default_run):
    folder, shown = default_run
    summary = json.loads((folder / "summary.json").read_text())
    assert {"num_requests", "method", "restraint", "seed", "wall_s", "edit_s", "baseline", "final", "curve"} <= set(
        summary
    )
    assert (summary["num_requests"], summary["method"], summary["restraint"], summary["seed"]) == (
        3,
        "rome",
        "prune",
        0,
    )
    assert summary["restraint_options"]["accumulate"] == "raw"
    assert [entry["num_requests"] for entry in summary["curve"]] == [0, 1, 2, 3]
    for scores in (summary["baseline"], summary["final"], *summary["curve"], summary["control"]["final"]):
        assert set(scores) >= SCORES
    assert summary["baseline"]["ability/miniature/retention"] == 1.0
    assert summary["baseline"]["spectrum/sigma_max_delta"] == 0.0
    assert summary["final"]["spectrum/sigma_max_delta"] > 0.0

    entries = lines(folder)
    assert [entry["num_requests"] for entry in entries] == [1, 2, 3]
    assert {"request", "before", "after", "update_norm", "seconds"} <= set(entries[0])
    with (folder / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert {"0", "1", "2", "3"} <= {row["step"] for row in logged}
    plots = sorted(path.stem for path in (folder / "plots").iterdir())
    assert plots == ["abilities", "editing", "immediate", "retention_accuracy", "retention_score", "spectra"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # the spectra, and how each edit holds in two forms
    assert "ROME with PRUNE, 3 edits: " in page
    assert page.count('<tr data-state="') == 3
    assert "http" not in page.split("Configuration")[0].replace("http-equiv", "")
    asked = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines() if '"answers"' in line]
    assert [row["case"] for row in asked if row["num_requests"] == 3] == [0, 1, 2]
    assert all(row["now"] for row in asked if row["num_requests"] == 3)
    assert summary["num_cases"]["edit/counterfact/efficacy_score"] == 3
    difference = summary["control"]["differences"]["edit/counterfact/locality_score"]
    key = "edit/counterfact/locality_score"
    assert difference[0] == pytest.approx(summary["final"][key] - summary["control"]["final"][key])
    assert "│ retention ↑ " in shown
    assert "The run lies in" in shown


def test_run_says_how_edits_hold_how_sure_that_is_and_what_it_cost(default_run):
    folder = default_run[0]
    summary = json.loads((folder / "summary.json").read_text())
    after = [line["after"]["accuracy"] for line in lines(folder)]
    assert summary["final"]["stream/accuracy/acquisition"] == pytest.approx(sum(after) / len(after))
    assert summary["final"]["stream/accuracy/final"] == pytest.approx(
        summary["final"]["edit/counterfact/efficacy_accuracy"]
    )
    assert summary["stream"]["abilities"]["ability/miniature/retention"]["area"] == pytest.approx(1.0, abs=0.3)
    assert [row["youngest"] for row in summary["stream"]["forms"]["score"]["by_age"]] == [0, 1, 2]
    assert [entry["num_requests"] for entry in summary["intervals"]] == [0, 1, 2, 3]
    for entry, scores in zip(summary["intervals"], summary["curve"], strict=True):
        assert {"edit/counterfact/locality_score", "ability/miniature/qa", "ability/miniature/retention"} <= set(entry)
        assert all(low - 1e-6 <= scores[key] <= high + 1e-6 for key, (low, high) in list(entry.items())[1:])
    spent = summary["evaluate_s_by"]
    assert {"edit/counterfact", "ability/miniature", "stream"} <= set(spent)
    assert summary["evaluate_s"] == pytest.approx(sum(spent.values()))
    evaluation = summary["evaluate_s"] + summary["edit_log_s"]
    assert summary["evaluate_share"] == pytest.approx(evaluation / (evaluation + summary["edit_s"]))
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    keys = [(row["measurement"], row["num_requests"], row.get("task"), row["case"]) for row in rows]
    assert len(set(keys)) == len(keys)
    mine = [r["locality_accuracy"] for r in rows if r["measurement"] == "edit/counterfact" and r["num_requests"] == 3]
    assert sum(mine) / len(mine) == pytest.approx(summary["final"]["edit/counterfact/locality_accuracy"])
    assert all("generated" in row for row in rows if row.get("task") == "summarization")


def test_same_seed_gives_the_same_edits(default_run, tmp_path):
    assert train(f"hydra.run.dir={tmp_path}", "control=false", *SMALL).returncode == 0
    assert without_seconds(tmp_path) == without_seconds(default_run[0])


def test_second_run_in_a_folder_keeps_the_first(default_run):
    folder = default_run[0]
    before = (folder / "edits.jsonl").read_text()
    done = train(f"hydra.run.dir={folder}", "control=false", "evaluation=editing", "data.num_edits=1", "progress=false")
    assert done.returncode == 0, done.stderr
    (earlier,) = folder.glob("earlier_*")
    assert (earlier / "edits.jsonl").read_text() == before
    assert len(lines(folder)) == 1
    for name in ("edits.jsonl", "cases.jsonl", "summary.json", "metrics.csv", "plots", "report.html"):
        (folder / name).rename(folder / f"second_{name}")
        (earlier / name).rename(folder / name)


def test_memit_in_batches_with_wandb_offline(tmp_path):
    done = train(
        f"hydra.run.dir={tmp_path}",
        "method=memit",
        "restraint=none",
        "logger=wandb",
        *SMALL,
        "data.num_edits=4",
        "data.protocol=sequential_batched",
        "data.batch_size=2",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["restraint"], summary["restraint_options"], summary["control"]) == ("none", None, None)
    assert [entry["num_requests"] for entry in summary["curve"]] == [0, 2, 4]
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    images = {path.name.split("_")[0] for path in (tmp_path / "wandb").rglob("*.png")}
    assert images == {"abilities", "editing", "immediate", "retention", "spectra"}


@pytest.mark.parametrize("protocol", ["single", "batch"])
def test_protocols_that_put_the_model_back(tmp_path, protocol):
    size = "data.batch_size=2" if protocol == "batch" else "data.batch_size=1"
    done = train(f"hydra.run.dir={tmp_path}", f"data.protocol={protocol}", size, "evaluation=editing", *SMALL[1:])
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["protocol"] == protocol
    assert summary["curve"][-1]["num_requests"] == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not part of the project")
@pytest.mark.parametrize(("data", "file"), [("counterfact", "counterfact_2000.json"), ("zsre", "zsre_1000.json")])
def test_real_records_on_the_bundled_model(tmp_path, data, file):
    done = train(
        f"hydra.run.dir={tmp_path}",
        f"data={data}",
        f"data.path={SHARED / 'data' / file}",
        "evaluation=editing",
        "control=false",
        *SMALL[1:],
    )
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=rme"], "unknown option method=rme: did you mean 'rome'"),
        (["methd=memit"], "unknown key 'methd': did you mean 'method'"),
        (["data.num_edit=5"], "unknown key 'data.num_edit': did you mean 'num_edits'"),
        (["data=counterfact"], "these settings need a value: data.path"),
        (["data=counterfact", "data.path=configs/trian.yaml"], "did you mean 'train.yaml'"),
        (["restraint.base=0.5"], "a number above 1"),
        (["model.path=./nowhere"], "no folder './nowhere'"),
        (["method.layers=[9]"], "layer 9 is outside"),
        (["trainer.max_epoch=2"], "did you mean 'max_epochs'"),
    ],
)
def test_mistakes_exit_with_2_and_one_clear_line(tmp_path, arguments, message):
    done = train(f"hydra.run.dir={tmp_path}", "progress=false", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_subject_outside_its_prompt_is_named_by_line(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"subject": "Bob", "prompt": "Ann plays the", "target_new": "oboe"}) + "\n")
    done = train(f"hydra.run.dir={tmp_path}", "data=jsonl", f"data.path={path}")
    assert done.returncode == 2
    assert "line 1: the subject 'Bob' is not in its prompt 'Ann plays the'" in done.stderr
    assert "Bob" in (tmp_path / "error.txt").read_text()


def test_unknown_family_names_the_yaml_to_write(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "codegen"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "prune_lightning" / "bundled" / "model" / name, tmp_path)
    done = train(f"hydra.run.dir={tmp_path / 'run'}", f"model.path={tmp_path}", "progress=false")
    assert done.returncode == 2, done.stderr
    assert "configs/model/family/codegen.yaml" in done.stderr


def test_a_stream_that_is_ended_at_an_evaluated_count_is_scored_there_once(tmp_path):
    words = ["data.num_edits=6", "+trainer.max_steps=5", "control=false", "callbacks=none", "method.value.steps=3"]
    done = train(f"hydra.run.dir={tmp_path}", "evaluation=editing", "progress=false", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["num_requests"] for entry in summary["curve"]] == [0, 1, 2, 5]
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    keys = [(row["measurement"], row["num_requests"], row.get("task", ""), row["case"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {key[3] for key in keys if key[:2] == ("stream", 5) and key[2] == ""} == set(range(5))
