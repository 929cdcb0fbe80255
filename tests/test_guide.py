"""docs/adding_a_method.md, followed to the letter."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from conftest import ROOT


def test_the_method_of_the_guide_runs(tmp_path):
    guide = (ROOT / "docs" / "adding_a_method.md").read_text()
    files = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", guide, re.DOTALL)
    assert sorted(name for name, _ in files) == ["my_edits/loudest_neurons.py", "my_edits/method/loudest_neurons.yaml"]
    for name, text in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (command,) = re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)
    command = command.strip().replace("python train.py", f"'{sys.executable}' '{ROOT / 'train.py'}'")
    quick = "evaluation.miniature.max_items=4 progress=false hydra.run.dir=run"
    done = subprocess.run(
        f"{command} {quick}", shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["num_requests"], summary["restraint"]) == ("loudest_neurons", 2, "prune")
    assert summary["control"] is not None
    edits = [json.loads(line) for line in (tmp_path / "run" / "edits.jsonl").read_text().splitlines()]
    assert len(edits) == 2
    for edit in edits:
        assert edit["applied"]
        assert edit["update_norm"] > 0
        assert len(set(edit["details"]["neurons"])) == 10
        assert edit["after"]["score"], "the new answer is preferred to the old one"
