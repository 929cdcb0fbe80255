"""The figures and tables of the studies, from run folders."""

from __future__ import annotations

import json

import pytest
import torch

from prune_lightning.errors import UserError
from prune_lightning.evaluation.edit_perplexity import EditPerplexity
from prune_lightning.evaluation.scoring import token_nll
from prune_lightning.metrics import SentencePerplexity
from prune_lightning.report.studies.__main__ import main
from prune_lightning.report.studies.batches import batch
from prune_lightning.report.studies.butterfly import butterfly, write_hard
from prune_lightning.report.studies.mirage import mirage
from prune_lightning.report.studies.page import markdown, write
from prune_lightning.report.studies.restrained import prune, rect
from prune_lightning.report.studies.runs import read_study
from prune_lightning.types import EditRequest


def run(folder, method, curve, config, **summary):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config))
    facts = {"ability/miniature": {"tasks": {"qa": 0.0}, "left_out": {}}}
    found = {"method": method, "restraint": "none", "model": "m", "data": "d", "curve": curve, "final": curve[-1]}
    (folder / "summary.json").write_text(json.dumps(found | {"labels": {}, "retention": facts} | summary))


def scores(count, kept, **more):
    names = ("efficacy", "generalization", "locality", "harmonic")
    return {
        "num_requests": count,
        "ability/miniature/qa": kept / 2,
        "ability/miniature/retention": kept,
        "spectrum/condition_number": 10.0,
        "spectrum/norm_ratio": 1.5,
        "spectrum/relative_change": 0.25,
        **{f"edit/counterfact/{name}_score": 0.75 for name in names},
        **more,
    }


def row(table, *starts):
    (line,) = [line for line in table.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(starts) :]


def lines_of(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_prune_has_a_line_for_each_base_and_the_editor_alone(tmp_path):
    for base, kept in ((None, 0.2), (1.2, 0.8), (2, 0.6)):
        config = {"restraint": {"base": base} if base else None}
        run(tmp_path / f"rome-{base}", "rome", [scores(0, 1.0), scores(5, kept)], config)
    (tmp_path / "unfinished").mkdir()
    table, drawing = prune(read_study([tmp_path]))
    assert row(table, "rome", "alone") == ["10.000", "1.500", "0.100", "0.200", "0.750"]
    assert row(table, "rome", "PRUNE, base 1.2")[2:] == ["0.400", "0.800", "0.750"]
    qa = lines_of(drawing.axes[2])
    assert qa == {
        "alone": ([0, 5], [0.5, 0.1]),
        "PRUNE, base 1.2": ([0, 5], [0.5, 0.4]),
        "PRUNE, base 2": ([0, 5], [0.5, 0.3]),
    }


def test_rect_places_retention_over_the_relative_change(tmp_path):
    for keep, change in ((None, 0.5), (0.2, 0.125)):
        config = {"restraint": {"keep": keep} if keep else None}
        end = scores(5, 0.75, **{"spectrum/relative_change": change})
        run(tmp_path / f"kn-{keep}", "kn", [scores(0, 1.0), end], config)
    table, drawing = rect(read_study([tmp_path]))
    assert row(table, "kn", "alone")[0] == "0.500"
    assert row(table, "kn", "0.2")[0] == "0.125"
    assert drawing.axes[0].collections[0].get_offsets().tolist() == [[0.125, 0.75], [0.5, 0.75]]
    assert drawing.axes[0].get_xscale() == "linear"


def test_rect_names_points_at_one_place_together(tmp_path):
    for keep, change in ((None, 0.5), (0.2, 0.5), (0.6, 0.01)):
        config = {"restraint": {"keep": keep} if keep else None}
        run(tmp_path / f"kn-{keep}", "kn", [scores(5, 0.75, **{"spectrum/relative_change": change})], config)
    _, drawing = rect(read_study([tmp_path]))
    assert sorted(text.get_text() for text in drawing.axes[0].texts) == ["0.2, alone", "0.6"]
    assert drawing.axes[0].get_xscale() == "log", "changes of 1 % and 50 % would be far apart on a linear axis"


def test_batch_separates_protocols_and_layers(tmp_path):
    for protocol, size, value in (("batch", 1, 0.9), ("batch", 8, 0.7), ("sequential_batched", 8, 0.4)):
        end = scores(8, 0.5, **{"edit/counterfact/efficacy_score": value})
        config = {"data": {"protocol": protocol, "batch_size": size}, "method": {"layers": [0]}}
        run(tmp_path / "study_batch" / f"{protocol}-{size}", "memit", [scores(0, 1.0), end], config)
    for layer, value in ((0, 0.7), (2, 0.3)):
        end = scores(8, 0.5, **{"edit/counterfact/efficacy_score": value})
        config = {"data": {"protocol": "batch", "batch_size": 8}, "method": {"layers": [layer]}}
        run(tmp_path / "study_layers" / f"{layer}", "memit", [scores(0, 1.0), end], config)
    table, drawing = batch(read_study([tmp_path / "study_batch", tmp_path / "study_layers"]))
    assert row(table, "memit", "each on the unedited model", "8") == ["0.700", "0.750", "0.750", "0.750", "–"]
    assert row(table, "memit", "one batch after another", "8")[-1] == "0.500"
    assert row(table, "memit", "2")[0] == "0.300"
    assert lines_of(drawing.axes[0]) == {
        "memit, each on the unedited model": ([1, 8], [0.9, 0.7]),
        "memit, one batch after another": ([8], [0.4]),
    }
    assert [list(line.get_xdata()) for line in drawing.axes[4].get_lines()] == [[0, 2]]


def test_mirage_shows_the_drop(tmp_path):
    end = {"num_requests": 5, "edit/easyedit/rewrite_acc": 1.0, "edit/easyedit/rephrase_acc": 0.5}
    end |= {
        "edit/easyedit/locality_acc": 0.25,
        "edit/wild/bare_efficacy_exact_match": 0.5,
        "edit/wild/bare_locality": 0.0,
    }
    end |= {"edit/wild/bare_generalization_exact_match": 0.25}
    for protocol in ("sequential", "single"):
        run(tmp_path / protocol, "ft_m", [end], {}, protocol=protocol)
    table, drawing = mirage(read_study([tmp_path]))
    assert row(table, "d", "single", "ft_m") == ["1.000", "0.500", "0.500", "0.250", "0.250", "0.000", "0.500"]
    assert [bar.get_height() for bar in drawing.axes[0].patches] == [1.0, 0.5]
    assert "unedited model" in drawing.axes[0].get_title()


def test_butterfly_keeps_the_edits_that_collapse_the_model(tmp_path):
    facts = {"edit/perplexity": {"reference": 4.0, "factor": 10.0, "sentences": 2}}
    relative = {"first": [1.0, None, 20.0, 2.0], "guarded": [1.0, 1.0, 1.0, 1.0]}
    for name, values in relative.items():
        config = {"callbacks": {"guards": {"policy": "rollback"}} if name == "guarded" else {}}
        run(tmp_path / name, "rome", [{"num_requests": 4}], config, measurements=facts)
        refused = "key: too small" if name == "guarded" else None
        requests = [
            {
                "case_id": i,
                "subject": "Ann",
                "prompt": f"Ann {i}",
                "target_new": "x",
                "target_old": None,
                "paraphrases": [],
            }
            | {"locality": [], "portability": [], "generation_prompts": [], "references": [], "subject_start": 0}
            for i in range(4)
        ]
        edits = [
            {"request": one, "details": {}, "refused": refused if i in (1, 2) else None}
            for i, one in enumerate(requests)
        ]
        (tmp_path / name / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
        head = {"measurement": "edit/perplexity", "num_requests": 4}
        rows = [{**head, "num_requests": 0, "case": i, "relative": 1.0, "collapsed": 0.0} for i in range(4)]
        rows += [
            {**head, "case": i, "relative": v, "collapsed": float(v is None or v > 10)} for i, v in enumerate(values)
        ]
        (tmp_path / name / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = read_study([tmp_path])
    table, drawing = butterfly(runs)
    assert row(table, "rome", "d", "4", "none") == ["0", "2", "inf", "20.000", "4.000"]
    assert row(table, "rome", "d", "4", "rollback")[:2] == ["2", "0"]
    assert "Refused by: key (2)." in table
    assert drawing.axes[0].collections[0].get_offsets()[:, 1].tolist() == [1.0, 2.0, 20.0, 1e30]
    assert write_hard(runs, tmp_path / "hard.jsonl") == 2
    hard = [json.loads(line) for line in (tmp_path / "hard.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in hard] == ["Ann 1", "Ann 2"]


def test_a_page_keeps_its_text(tmp_path):
    table, drawing = "| new |", prune_figure(tmp_path)
    page = tmp_path / "x.md"
    page.write_text("before\n<!-- table -->\n| old |\n<!-- end of table -->\nafter\n")
    write(tmp_path, "x", table, drawing)
    assert page.read_text() == "before\n<!-- table -->\n| new |\n<!-- end of table -->\nafter\n"
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert markdown(["a", "b"], [["x", 0.5], ["y", None]]).splitlines()[2:] == ["| x | 0.500 |", "| y | – |"]
    assert main(["prune", str(tmp_path), "--out", str(tmp_path)]) == 2


def prune_figure(folder):
    run(folder / "runs" / "a", "rome", [scores(0, 1.0), scores(5, 0.5)], {"restraint": None})
    return prune(read_study([folder / "runs"]))[1]


def test_folders_without_a_run_are_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no summary"):
        read_study([tmp_path])
    with pytest.raises(UserError, match="holds no run folder"):
        read_study([tmp_path / "empty"])


def test_the_perplexity_of_an_edit_is_that_of_sentences(bundled):
    measurement = EditPerplexity(max_items=5, factor=10.0)
    cases = {3: EditRequest(0, "a", "a", "b"), 5: EditRequest(1, "a", "a", "b")}
    measurement.take_reference(bundled, cases)
    found = measurement.measure(bundled, cases)
    reference = SentencePerplexity()
    reference.update(*token_nll(bundled, measurement.sentences, special_tokens=False))
    assert found.scores["me_ppl"] == pytest.approx(float(reference.compute()["mean"]), rel=1e-6)
    assert (found.scores["relative"], found.scores["collapsed"]) == (1.0, 0.0)
    assert [row["case"] for row in found.cases] == [3, 5]
    with torch.no_grad():
        next(module for name, module in bundled.model.named_modules() if name.endswith("mlp.c_proj")).weight.mul_(100)
    assert measurement.measure(bundled, cases).scores["collapsed"] == 1.0
