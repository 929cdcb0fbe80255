"""Reports of runs with any measurements, and the comparison of runs."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import yaml

from prune_lightning.errors import UserError
from prune_lightning.evaluation.me_ppl import SentencePerplexities
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.evaluation.stream import StreamScores
from prune_lightning.evaluation.wild import WildGeneration
from prune_lightning.evaluation.zsre import ZsREScores
from prune_lightning.report import compare
from prune_lightning.report.curves import plot_abilities, plot_editing, plot_immediate, plot_retention
from prune_lightning.report.labels import Labels
from prune_lightning.report.table import rows
from prune_lightning.report.trajectories import ability_trajectories, edit_trajectories, log_growth

PARTS = (ZsREScores, WildGeneration, SentencePerplexities, MiniatureAbilities, StreamScores)
LABELS = Labels({part.name: {"title": part.title, "scores": part.labels} for part in PARTS})


def run(folder, method, restraint, seed, scores):
    """A run folder of three evaluations; `scores` gives each score's values."""
    curve = [{"num_requests": t, **{k: v[i] for k, v in scores.items()}} for i, t in enumerate((0, 10, 20))]
    summary = {"method": method, "restraint": restraint, "seed": seed, "curve": curve}
    path = folder / f"{method}-{restraint}-{seed}"
    path.mkdir()
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_comparison_chooses_scores_that_all_runs_have(tmp_path, capsys):
    other = {"ability/lm_eval/retention": [1.0, 0.4, 0.3], "edit/zsre/efficacy": [0.0, 0.9, 0.8]}
    both = {compare.KEPT: [1.0, 0.9, 0.45], compare.WRITTEN: [0.0, 1.0, 0.9], **other}
    first = run(tmp_path, "rome", "none", 0, both)
    assert compare.Keys.common(compare.read_groups([first])) == compare.Keys(compare.KEPT, compare.WRITTEN)
    folders = [first, run(tmp_path, "rome", "none", 1, other), run(tmp_path, "memit", "prune", 0, other)]
    groups = compare.read_groups(folders)
    keys = compare.Keys.common(groups)
    assert keys == compare.Keys("ability/lm_eval/retention", "edit/zsre/efficacy")
    assert (
        compare.main([*map(str, folders), "--out", str(tmp_path), "--figures", "compare", "collapse", "forgetting"])
        == 0
    )
    table = (tmp_path / "compare.md").read_text()
    assert "| rome | none | 10 | 0.400 | 0.900 | 0.300 |" in table
    assert "`ability/lm_eval/retention`" in table
    assert table.strip() in capsys.readouterr().out
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in compare.FIGURES)


def test_comparison_has_drift_where_all_runs_have_it(tmp_path):
    """In a figure of its own scale: a row of axes for retention, one for efficacy, one for drift."""
    scores = {compare.KEPT: [1.0, 0.9, 0.8], compare.WRITTEN: [0.0, 1.0, 0.9]}
    drifting = {**scores, "drift/kl": [0.0, 0.5, 4.0], "spectrum/condition_number": [20.0, 30.0, 65.0]}
    drifting["stream/locality_agreement"] = [None, 0.9, 0.7]
    groups = compare.read_groups(
        [run(tmp_path, "rome", "none", 0, drifting), run(tmp_path, "rome", "prune", 0, drifting)]
    )
    drawing = compare.plot_compare(groups, compare.Keys(compare.KEPT, compare.WRITTEN))
    drift = drawing.axes[2]
    assert [list(line.get_ydata()) for line in drift.lines] == 2 * [[0.0, 0.5, 4.0]]
    assert drift.get_ylim()[0] == 0
    assert drift.get_ylim()[1] > 4
    assert drawing.axes[0].get_ylim() == (-0.03, 1.05)
    table = compare.markdown_table(groups, compare.Keys(compare.KEPT, compare.WRITTEN))
    assert "| method | restraint | retention, 20 edits |" in table, "no method lost half of its abilities"
    assert "| rome | prune | 0.800 | 0.900 | – | – | – | 0.700 | 4.000 | 65.000 |" in table
    far = run(tmp_path, "memit", "none", 1, {**drifting, "drift/kl": [0.0, 5.0, 40.0]})
    two = compare.plot_compare(
        compare.read_groups([far, *tmp_path.glob("rome-*")]), compare.Keys(compare.KEPT, compare.WRITTEN)
    )
    assert two.axes[-1].get_ylim() == two.axes[-2].get_ylim(), "the methods share the scale"
    assert two.axes[-1].get_ylim()[1] > 40, "which holds the largest drift"
    without = compare.read_groups([run(tmp_path, "memit", "none", 0, scores), tmp_path / "rome-none-0"])
    assert len(compare.plot_compare(without, compare.Keys(compare.KEPT, compare.WRITTEN)).axes) == 2 * 2


def configured(folder, number, choices, seed=0, kept=0.5, **changes):
    """A run folder with a configuration; `changes` are settings by dotted name."""
    path = run(folder, choices["method"], choices["restraint"], number, {compare.KEPT: [1.0, 0.9, kept]})
    config = {
        "seed": seed,
        "progress": True,
        "method": {"layers": [0], "contexts": {"seed": "${seed}"}, "second_moments": "${model.second_moments}"},
        "model": {"path": "bundled", "second_moments": {"cache": None, "ridge": 1e-3}},
        "data": {"num_edits": 20, "seed": "${seed}"},
        "restraint": {"base": 1.2} if choices["restraint"] != "none" else None,
        "trainer": {"devices": 1},
    }
    for name, value in changes.items():
        *outer, last = name.split("__")
        part = config
        for key in outer:
            part = part[key]
        part[last] = value
    (path / ".hydra").mkdir()
    (path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, **choices, "seed": seed}))
    return path


def labelled(folders):
    """The groups that a comparison makes: label of method and restraint, and the seeds."""
    return {
        (group.method, group.restraint): sorted(run["seed"] for run in group.runs)
        for group in compare.read_groups(folders)
    }


def test_methods_stand_in_equal_bands_with_titles_that_do_not_touch(tmp_path):
    scores = {compare.KEPT: [1.0, 0.9, 0.8], compare.WRITTEN: [0.0, 1.0, 0.9]}
    names = ["rome", "emmet", "memit (accumulate_past_keys=false)", "memit (accumulate_past_keys=true)", "kn", "ft"]
    folders = [run(tmp_path, name, "none", 0, scores) for name in names]
    folders += [run(tmp_path, "rome", f"revive_feedback_{number}", 0, scores) for number in range(8)]
    groups = compare.read_groups(folders)
    drawing = compare.plot_compare(groups, compare.Keys(compare.KEPT, compare.WRITTEN))
    drawing.draw_without_rendering()
    legend = drawing.legends[0].get_window_extent()
    assert drawing.bbox.x0 <= legend.x0
    assert legend.x1 <= drawing.bbox.x1
    bands: dict[int, list] = {}
    for axes in drawing.axes:
        if axes.get_title():
            bands.setdefault(round(axes.bbox.y0), []).append(axes.title.get_window_extent())
        numbers = any(label.get_visible() for label in axes.get_xticklabels())
        assert numbers == bool(axes.get_xlabel()), "the lowest axes of each band have the numbers of edits"
    assert [len(titles) for titles in bands.values()] == [3, 3]
    assert all(a.x1 < b.x0 for titles in bands.values() for a, b in itertools.pairwise(titles))


def test_only_runs_that_differ_in_the_seed_are_averaged(tmp_path):
    rome, prune = {"method": "rome", "restraint": "none"}, {"method": "rome", "restraint": "prune"}
    first = configured(tmp_path, 1, rome, seed=0)
    elsewhere = {"progress": False, "trainer__devices": 2, "model__second_moments__cache": "/tmp/c"}
    same = [
        first,
        configured(tmp_path, 2, rome, seed=1, **elsewhere),
        configured(tmp_path, 3, prune, seed=0),
        configured(tmp_path, 4, prune, seed=1),
    ]
    assert labelled(same) == {("rome", "none"): [0, 1], ("rome", "prune"): [0, 1]}

    base = configured(tmp_path, 5, prune, seed=2, restraint__base=10)
    assert labelled([*same, base]) == {
        ("rome", "none"): [0, 1],
        ("rome", "prune (base=1.2)"): [0, 1],
        ("rome", "prune (base=10)"): [2],
    }
    layers = configured(tmp_path, 6, rome, seed=0, method__layers=[1])
    ridge = configured(tmp_path, 7, rome, seed=0, model__second_moments__ridge=0.1, method__layers=[1])
    assert labelled([first, layers, ridge]) == {
        ("rome (layers=[0], model.second_moments.ridge=0.001)", "none"): [0],
        ("rome (layers=[1], model.second_moments.ridge=0.001)", "none"): [0],
        ("rome (layers=[1], model.second_moments.ridge=0.1)", "none"): [0],
    }
    with pytest.raises(UserError, match=r"rome-none-1.*rome-none-8.*same configuration and the same seed \(0\)"):
        compare.read_groups([first, configured(tmp_path, 8, rome, seed=0, progress=False)])


def test_entries_of_a_model_that_the_method_does_not_read_tell_no_runs_apart(tmp_path):
    """Such as the section of a method that a later version of the model's YAML has added."""
    rome, reads = {"method": "rome", "restraint": "none"}, {"method__layers": "${oc.select:model.edit.rome.layers,[0]}"}
    older = configured(tmp_path, 1, rome, seed=0, **reads)
    later = {"model__edit": {"grace": {"layers": [2]}}, "model__control": True}
    same = [older, configured(tmp_path, 2, rome, seed=1, **reads, **later)]
    assert labelled(same) == {("rome", "none"): [0, 1]}
    read = {"model__edit": {"rome": {"layers": [1]}}}
    assert labelled([*same, configured(tmp_path, 3, rome, seed=2, **reads, **read)]) == {
        ("rome (model.edit.rome.layers=null)", "none"): [0, 1],
        ("rome (model.edit.rome.layers=[1])", "none"): [2],
    }
    text = [configured(tmp_path, i, rome, seed=i, model__second_moments={"ridge": i}, **reads) for i in (4, 5)]
    assert len(labelled(text)) == 2, "the method refers to the second moments"
    alone = {"method__second_moments": None, **reads}
    text = [configured(tmp_path, i, rome, seed=i, model__second_moments={"ridge": i}, **alone) for i in (6, 7)]
    assert labelled(text) == {("rome", "none"): [6, 7]}


def test_two_models_share_no_band(tmp_path):
    """One name stands for what differs between models, and is given wherever runs of several models are compared."""
    small = {"method": "rome", "restraint": "prune", "model": "small", "data": "bundled"}
    large = {**small, "model": "large"}
    memit = {**large, "method": "memit"}
    folders = [
        configured(tmp_path, 1, small, kept=0.2),
        configured(tmp_path, 2, large, kept=0.8, model__path="large", method__layers=[17]),
        configured(tmp_path, 3, memit, model__path="large"),
    ]
    assert list(labelled(folders)) == [
        ("rome (model=small)", "prune"),
        ("rome (model=large)", "prune"),
        ("memit (model=large)", "prune"),
    ]
    assert compare.main([*map(str, folders), "--out", str(tmp_path), "--figures", "compare", "collapse"]) == 0
    table = (tmp_path / "compare.md").read_text()
    assert "| rome (model=small) | prune | 0.200 |" in table
    assert "| rome (model=large) | prune | 0.800 |" in table


def test_runs_without_a_configuration_are_grouped_by_their_summaries(tmp_path, capsys):
    with_base = [run(tmp_path, "rome", "prune", seed, {compare.KEPT: [1.0, 0.9, 0.4]}) for seed in (0, 1)]
    for path, base in zip(with_base, (1.2, 10), strict=True):
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps({**summary, "restraint_options": {"base": base}}))
    assert labelled(with_base) == {("rome", "prune (base=1.2)"): [0], ("rome", "prune (base=10)"): [1]}
    assert "no .hydra/config.yaml" in capsys.readouterr().err


def test_runs_that_are_not_finished_are_left_out(tmp_path, capsys):
    finished = run(tmp_path, "rome", "prune", 0, {compare.KEPT: [1.0, 0.9, 0.4]})
    begun = tmp_path / "rome-prune-1"
    begun.mkdir()
    assert labelled([finished, begun]) == {("rome", "prune"): [0]}
    assert f"left out, since they are not finished: {begun}" in capsys.readouterr().err
    with pytest.raises(UserError, match="not the folder of a finished run"):
        labelled([begun])


def test_collapse_needs_two_checkpoints_and_is_censored_otherwise(tmp_path):
    once = run(tmp_path, "rome", "none", 0, {compare.KEPT: [1.0, 0.9, 0.4]})
    twice = run(tmp_path, "rome", "none", 1, {compare.KEPT: [1.0, 0.5, None]})
    (group,) = compare.read_groups([once, twice])
    assert compare.collapses(group, compare.KEPT) == ([20.0, 10.0], [False, True])
    assert group.range(compare.KEPT, 10) == (0.5, 0.9)


def test_table_shows_every_score_and_friendly_names_where_known():
    columns = {
        "before": {"ability/miniature/qa": 0.9, "edit/new/odd_score": 0.1},
        "after": {
            "ability/miniature/qa": math.nan,
            "stream/score/half_life": 7.0,
            "stream/score/half_life_censored": 1.0,
        },
    }
    found = {title: [[row.name, *row.cells] for row in lines] for title, lines in rows(columns, LABELS).items()}
    assert found == {
        "edit/new": [["odd score", "0.100", "–"]],
        "stream": [["half-life in edits, success ↑", "–", "> 7.000"]],
        "abilities, bundled tasks": [["open-domain question answering ↑", "0.900", "–"]],
    }


def test_plots_follow_the_scores():
    curve = [
        {"num_requests": t, "edit/zsre/efficacy": 0.5, "edit/wild/bare_efficacy_contains": 0.2, "edit/wild/num_odd": 7}
        for t in (0, 1, 5)
    ]
    for entry in curve:
        entry |= {"ability/me_ppl/mean": 20.0 + entry["num_requests"], "ability/new/task": 0.4}
    curve[-1]["ability/new/task"] = None  # not finite
    titles = [axes.get_title() for axes in plot_editing({"run": curve}, labels=LABELS).axes]
    assert titles == ["edits, zsRE", "edits, generated answers (WILD): contains"]
    abilities = plot_abilities(
        {"run": curve}, {"run": [{"num_requests": t, "ability/new/task": [0.1, 0.6]} for t in (0, 1)]}, LABELS
    )
    assert {axes.get_title() for axes in abilities.axes} == {
        "perplexity of sentences (ME-PPL): mean perplexity",
        "ability/new",
    }
    assert plot_abilities({"run": [{"num_requests": 0, "edit/zsre/efficacy": 0.5}]}) is None
    assert plot_immediate({"run": curve}, {}) is None
    heat = plot_retention([(0, 1, 0, 0.0), (1, 1, 0, 1.0), (2, 2, 1, 1.0), (2, 1, 0, 0.0)], "exact match")
    shown = heat.axes[0].images[0].get_array()
    assert shown[0].tolist() == [1.0, 0.0]
    assert shown[1, 0] == 1.0
    assert math.isnan(shown.filled(math.nan)[1, 1])


def test_trajectories_by_hand():
    curve = [
        {"num_requests": t, "a": a, "stream/score/final": f}
        for t, a, f in ((0, 0.5, None), (1, 0.5, 0.8), (3, 0.0, 0.4))
    ]
    assert ability_trajectories(curve, {"a": 0.0, "b": 0.0})["a"]["area"] == pytest.approx((1 + 1) / 3)
    found = edit_trajectories(curve, ["stream/score/final"])["stream/score/final"]
    assert (found["area"], found["first_below"]) == (pytest.approx(0.6), 3)
    readings = [
        {"step": t, "spectrum/w/norm_ratio": math.exp(0.02 * t), "spectrum/w/delta_norm_ratio": 1.0} for t in (0, 5, 9)
    ]
    assert log_growth(readings) == {"spectrum/w": pytest.approx(0.02)}
