"""Reports of runs with any measurements, and the comparison of runs."""

from __future__ import annotations

import json
import math

import pytest

from prune_lightning.report import compare
from prune_lightning.report.curves import plot_abilities, plot_editing, plot_immediate, plot_retention
from prune_lightning.report.page import write_page
from prune_lightning.report.table import rows
from prune_lightning.report.trajectories import ability_trajectories, edit_trajectories, log_growth


def run(folder, method, restraint, seed, scores):
    """A run folder of three evaluations; `scores` gives each score's values."""
    curve = [{"num_edits": t, **{k: v[i] for k, v in scores.items()}} for i, t in enumerate((0, 10, 20))]
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
    assert rows(columns) == {
        "edit/new": [["odd_score", "0.100", "–"]],
        "stream": [["half-life, edits, preferred", "–", "> 7.000"]],
        "abilities in miniature": [["open-domain questions", "0.900", "–"]],
    }


def test_page_escapes_what_comes_from_data(tmp_path):
    name = "ability/<script>/x"
    write_page(tmp_path / "page.html", "<b>", {"<i>": {name: 1.0}}, [], "config: <u>", ["a < b"])
    page = (tmp_path / "page.html").read_text()
    assert not any(tag in page for tag in ("<script>", "<b>", "<i>", "<u>", "a < b"))
    assert "a &lt; b" in page


def test_plots_follow_the_scores():
    curve = [
        {"num_edits": t, "edit/zsre/efficacy": 0.5, "edit/wild/bare_efficacy_contains": 0.2, "edit/wild/num_odd": 7}
        for t in (0, 1, 5)
    ]
    for entry in curve:
        entry |= {"ability/me_ppl/mean": 20.0 + entry["num_edits"], "ability/new/task": 0.4}
    curve[-1]["ability/new/task"] = None  # not finite
    titles = [axes.get_title() for axes in plot_editing({"run": curve}).axes]
    assert titles == ["edits, zsRE", "edits, free answers (WILD): contains"]
    abilities = plot_abilities(
        {"run": curve}, {"run": [{"num_edits": t, "ability/new/task": [0.1, 0.6]} for t in (0, 1)]}
    )
    assert {axes.get_title() for axes in abilities.axes} == {"perplexity of sentences (ME-PPL): mean", "ability/new"}
    assert plot_abilities({"run": [{"num_edits": 0, "edit/zsre/efficacy": 0.5}]}) is None
    assert plot_immediate({"run": curve}, {}) is None
    heat = plot_retention([(0, 1, 0, 0.0), (1, 1, 0, 1.0), (2, 2, 1, 1.0), (2, 1, 0, 0.0)], "said")
    shown = heat.axes[0].images[0].get_array()
    assert shown[0].tolist() == [1.0, 0.0]
    assert shown[1, 0] == 1.0
    assert math.isnan(shown.filled(math.nan)[1, 1])


def test_trajectories_by_hand():
    curve = [
        {"num_edits": t, "a": a, "stream/score/final": f} for t, a, f in ((0, 0.5, None), (1, 0.5, 0.8), (3, 0.0, 0.4))
    ]
    assert ability_trajectories(curve, ["a", "b"])["a"]["area"] == pytest.approx((1 + 1) / 3)
    found = edit_trajectories(curve, ["stream/score/final"])["stream/score/final"]
    assert (found["area"], found["first_below"]) == (pytest.approx(0.6), 3)
    looks = [
        {"step": t, "spectrum/w/norm_ratio": math.exp(0.02 * t), "spectrum/w/delta_norm_ratio": 1.0} for t in (0, 5, 9)
    ]
    assert log_growth(looks) == {"spectrum/w": pytest.approx(0.02)}
