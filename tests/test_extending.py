"""The page on extending, followed literally."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")


def write_files(folder):
    for name, content in re.findall(r"```(?:python|yaml)\n# (my_ext/\S+)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_a_restraint_a_measurement_and_a_callback_run_together(tmp_path):
    write_files(tmp_path)
    (command,) = re.findall(r"```bash\nPYTHONPATH=my_ext python train.py (.*?)\n```", PAGE)
    quick = ["method.value.steps=2", "control=false", "progress=false", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *command.split(), *quick],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "my_ext")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "entropy after the prompt" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "entropy of the first token (nats)" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["restraint"] == "halve"
    assert summary["largest_change"] > 0
    assert summary["final"]["edit/entropy/mean"] >= 0
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"change/norm", "restraint/dropped_norm", "edit/entropy/mean"} <= set(header)


def test_a_law_of_ones_own_is_composed(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "my_ext"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["restraint=geometric", f"hydra.searchpath=[file://{tmp_path / 'my_ext'}]"]
        restraint = instantiate(compose("train", overrides=overrides).restraint)
    assert restraint.law(torch.tensor([4.0]), 1.0).tolist() == [2.0]
