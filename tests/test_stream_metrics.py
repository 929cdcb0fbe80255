"""Metrics over the stream: every formula against plain loops, sampling, honest rows and intervals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT, quiet_trainer
from scipy import stats
from stream_entries import ENTRIES, filled

from prune_lightning.callbacks import EditEvaluation, EditLedger, EditLog
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.errors import UserError
from prune_lightning.evaluation.case_rows import CaseRows, resampled
from prune_lightning.evaluation.case_sampler import CaseSampler
from prune_lightning.evaluation.measurement import EditingMeasurement, Measured
from prune_lightning.evaluation.stream import StreamScores, Success, success
from prune_lightning.json_files import nan_to_null
from prune_lightning.ledger import Ledger
from prune_lightning.methods.base import EditingModule
from prune_lightning.metrics import AbilityCurve, RetentionMatrix
from prune_lightning.metrics.bootstrap import interval, resampled_means
from prune_lightning.metrics.stream_functional import half_life
from prune_lightning.metrics.trajectory import area, collapse, first_below, kaplan_meier_median
from prune_lightning.types import LowRankUpdate

TABLE = {(t, i): (commit, value) for t, commit, i, value in ENTRIES}


def of(t, i):
    return TABLE[t, i][1]


def written(t, before=False):
    """Cases looked at, at ``t``, and written by then; their commits."""
    return [(i, c) for (time, i), (c, _) in TABLE.items() if time == t and (c < t if before else c <= t)]


# -- formulas against plain loops -------------------------------------------------------------------------------------
def test_retention_matrix_against_loops():
    found = {name: float(value) for name, value in filled(ENTRIES).compute().items()}
    commits = {i: c for (_, i), (c, _) in TABLE.items()}
    last = max(t for t, _ in TABLE)
    at_first = {i: of(c, i) for i, c in commits.items() if (c, i) in TABLE}
    assert found["acquisition"] == pytest.approx(np.mean(list(at_first.values())))
    assert found["final"] == pytest.approx(np.mean([of(last, i) for i, _ in written(last)]))
    losses = [at_first[i] - of(last, i) for i, _ in written(last, before=True)]
    assert found["forgetting"] == pytest.approx(np.mean(losses))
    assert found["bwt"] == pytest.approx(-np.mean(losses))
    drops = []
    for i, c in written(last, before=True):
        drops.append(max(v for (s, j), (_, v) in TABLE.items() if j == i and c <= s < last) - of(last, i))
    assert found["forgetting_max"] == pytest.approx(np.mean(drops))
    assert found["forgetting_max"] > found["forgetting"]
    shifts = []
    for i, c in commits.items():
        before = [s for s, j in TABLE if j == i and s < c]
        shifts.append(of(max(before), i) - of(0, i))
    assert found["fwt"] == pytest.approx(np.mean(shifts))
    assert found["fwt"] != 0


def test_retention_by_age_against_loops():
    bins = filled(ENTRIES).by_age()
    ranges = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [(row.youngest, row.oldest) for row in bins] == ranges
    for row in bins:
        pairs = [(t - c, v, of(c, i)) for (t, i), (c, v) in TABLE.items() if row.youngest <= t - c <= row.oldest]
        ages, now, first = np.array(pairs).T
        assert (row.pairs, row.age) == (len(pairs), pytest.approx(ages.mean()))
        assert row.retention == pytest.approx(now.mean())
        assert row.conditional == pytest.approx((now * first).sum() / first.sum())
        assert row.backward_transfer == pytest.approx((now - first).mean())


def test_half_life_is_interpolated_or_censored():
    assert half_life([0, 1, 3], [0.8, 0.6, 0.2]).age == pytest.approx(2.0)
    assert half_life([0, 1, 4], [0.8, 0.6, 0.3]).age == pytest.approx(3.0)
    assert half_life([0, 1, 3], [0.8, 0.6, 0.4]) == half_life([0, 1, 3, 9], [0.8, 0.6, 0.4, 0.8])
    censored = half_life([0, 1, 3], [0.8, 0.6, 0.41])
    assert (censored.age, censored.censored) == (3, True)
    assert math.isnan(half_life([0, 1], [0.0, 0.0]).age)


def test_identity_edits_have_no_backward_transfer():
    values = {0: 1.0, 1: 0.0, 2: 0.5}
    matrix = RetentionMatrix()
    for t in (0, 1, 2, 3):
        matrix.update(t, torch.tensor([1, 2, 3]), torch.arange(3), torch.tensor(list(values.values())))
    found = matrix.compute()
    assert (float(found["bwt"]), float(found["fwt"]), float(found["forgetting_max"])) == (0, 0, 0)
    assert float(found["acquisition"]) == float(found["final"]) == 0.5


def test_nan_is_a_failure_and_counted():
    matrix = RetentionMatrix()
    matrix.update(1, torch.tensor([1]), torch.tensor([0]), torch.tensor([1.0]))
    matrix.update(2, torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([math.nan, math.inf]))
    found = matrix.compute()
    assert (float(found["final"]), float(found["num_nonfinite"]), float(found["bwt"])) == (0.0, 2.0, -1.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([(4, 9, 0, 1.0)], "two different commits"),
        ([ENTRIES[0]], "occurs twice"),
        ([(8, 7, 77, 1.0)], "no score from right after"),
    ],
)
def test_repeated_and_missing_entries_are_refused(more, message):
    with pytest.raises(UserError, match=message):
        filled([*ENTRIES, *more]).compute()


def test_a_sample_in_strata_stands_for_everybody():
    """With ages weighed by their number, a bin's looked-at cases count for all of it."""
    matrix, last = RetentionMatrix(), 8
    for i in range(last):
        matrix.update(i + 1, torch.tensor([i + 1]), torch.tensor([i]), torch.tensor([1.0]))
    looked_at = {6: 1.0, 5: 0.0, 0: 0.0, 3: 1.0}  # ages 1; 2-3 (two cases); 4-7 (four cases)
    index = torch.tensor(list(looked_at))
    matrix.update(last, index + 1, index, torch.tensor(list(looked_at.values())))
    expected = (1 * 1.0 + 1 * 1.0 + 2 * 0.0 + 4 * 0.5) / 8
    assert float(matrix.compute()["final"]) == pytest.approx(expected)
    assert float(matrix.compute()["bwt"]) == pytest.approx((1 * 0.0 + 2 * -1.0 + 4 * -0.5) / 7)


# -- ability curves ---------------------------------------------------------------------------------------------------
def test_areas_against_numpy():
    t, g = [0, 1, 5, 10, 50], [1.0, 0.9, 0.95, 0.4, 0.1]
    assert area(torch.tensor(t), torch.tensor(g)) == pytest.approx(np.trapezoid(g, t) / 50)
    logs = np.log2(1 + np.array(t))
    assert area(torch.tensor(t), torch.tensor(g), log=True) == pytest.approx(np.trapezoid(g, logs) / logs[-1])


def test_collapse_must_last():
    def curve(*scores):
        metric = AbilityCurve(chance=0.2)
        for t, score in reversed(list(enumerate(scores))):  # in any order
            metric.update(10 * t, score)
        return {name: float(value) for name, value in metric.compute().items()}

    assert curve(1.0, 0.5, 1.0, 0.5, 0.4)["edits_to_collapse"] == 30
    assert curve(1.0, 0.5, 1.0, 0.5)["edits_to_collapse"] == math.inf
    broken = curve(1.0, 1.0, math.nan, math.nan)
    assert (broken["edits_to_collapse"], broken["num_nonfinite"]) == (20, 2)
    assert curve(0.7, 0.7, 0.7)["area"] == pytest.approx(1.0)  # an identity edit: g = 1
    assert collapse([0, 5], [True, False], persistence=1) == 0
    assert first_below([1, 2, 3], [0.7, math.nan, 0.5], 0.6) == 2


def test_kaplan_meier_median_by_hand():
    # at risk 5: one event -> 0.8; one censored; at risk 3: one event -> 0.533; at risk 2: one event -> 0.267
    assert kaplan_meier_median([10, 15, 20, 30, 40], [True, False, True, True, False]) == 30
    assert kaplan_meier_median([10, 20], [False, False]) is None


# -- sampling ---------------------------------------------------------------------------------------------------------
def test_sample_covers_every_age_and_all_of_the_last_batch():
    commits = [5 * (i // 5 + 1) for i in range(500)]
    probes, now = CaseSampler(commits, max_cases=40, seed=3), 400
    chosen = probes.chosen(now)
    strata = probes.strata(now)
    assert set(range(395, 400)) <= set(chosen)
    assert all(set(bin_) & set(chosen) for bin_ in strata)
    assert len(chosen) == 40
    assert sum(chosen.values()) == pytest.approx(now)
    for bin_ in strata:
        assert sum(chosen.get(i, 0.0) for i in bin_) == pytest.approx(len(bin_))
    assert chosen == CaseSampler(commits, 40, 3).chosen(now) != CaseSampler(commits, 40, 4).chosen(now)
    oldest = [i for i in chosen if i in strata[-1]]
    assert oldest != strata[-1][: len(oldest)]
    assert CaseSampler(commits).chosen(now) == dict.fromkeys(range(400), 1.0)
    assert len(CaseSampler(commits, 1).chosen(now)) == 5 + len(strata) - 1
    with pytest.raises(UserError, match="max_cases"):
        CaseSampler(commits, 0)


# -- rows and intervals -----------------------------------------------------------------------------------------------
def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    values = (rng.random((80, 2)) < [0.7, 0.2]).astype(float)
    means = resampled_means(values)
    for column in range(2):
        reference = stats.bootstrap((values[:, column],), np.mean, n_resamples=5000, method="percentile", rng=1)
        found = interval(means[:, column])
        assert found == pytest.approx(tuple(reference.confidence_interval), abs=0.02)
    assert np.array_equal(means, resampled_means(values, block=1))
    assert np.array_equal(resampled_means(np.ones((7, 1))), np.ones((1000, 1)))


def test_resampled_means_weigh_their_cases():
    """Against NumPy, draw by draw: the same draws for every column and every call, each case with its weight."""
    rng = np.random.default_rng(5)
    values, weights = rng.random((6, 2)), np.array([1.0, 4.0, 1.0, 9.0, 2.0, 1.0])
    means = resampled_means(values, weights, resamples=50, seed=3)
    draws = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=50)
    for draw, found in zip(draws, means, strict=True):
        drawn = np.repeat(np.arange(6), draw)
        assert found == pytest.approx(np.average(values[drawn], axis=0, weights=weights[drawn]))
    assert np.array_equal(means, resampled_means(values, weights, resamples=50, seed=3))
    assert not np.allclose(means, resampled_means(values, resamples=50, seed=3))


def test_rows_decide_which_cases_take_part():
    rows = [
        {"case": 0, "a": 1.0, "b": True},
        {"case": 1, "a": math.nan, "b": None, "weight": 3.0},
        {"case": 2, "a": 1.0, "text": "?"},
    ]
    rows = [{**row, "d": value} for row, value in zip(rows, (20.0, math.inf, 21.0), strict=True)]
    found = resampled(rows, ["a", "b", "text", "c", "d"])
    assert sorted(found) == ["a", "b"], "a perplexity that is infinite once has no finite mean"
    assert found["a"][0] == pytest.approx(2 / 5)
    assert found["b"][0] == 1.0


def test_repeated_and_missing_cases_are_refused(tmp_path):
    rows = CaseRows(tmp_path / "cases.jsonl")
    rows.add("edit/x", 0, [{"case": i, "a": 0.0} for i in range(3)], asked=range(3))
    rows.add("edit/x", 2, [{"case": i, "a": math.nan} for i in range(2)], asked=range(2))
    with pytest.raises(UserError, match=r"no row of case 1, but had before"):
        rows.add("edit/x", 2, [{"case": 0}], asked=range(2))
    with pytest.raises(UserError, match=r"more than one row of case 0"):
        rows.add("edit/x", 2, [{"case": 0}, {"case": 0}], asked=range(1))
    rows.add("ability/y", 0, [{"case": 0, "task": task} for task in "pq"])
    with pytest.raises(UserError, match=r"no row of q 0"):
        rows.add("ability/y", 1, [{"case": 0, "task": "p"}])
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [(line["num_requests"], line["measurement"], line["case"]) for line in lines[:5]] == [
        *((0, "edit/x", i) for i in range(3)),
        *((2, "edit/x", i) for i in range(2)),
    ]
    assert lines[4]["a"] is None


def test_the_size_of_the_rows_is_bounded(tmp_path):
    rows = CaseRows(tmp_path / "cases.jsonl", max_mb=1e-4)
    rows.add("ability/y", 0, [{"case": i} for i in range(5)])
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 1
    assert rows.left_out == 4


# -- the whole way ----------------------------------------------------------------------------------------------------
class Edits(EditingModule):
    """Adds nothing, or something not finite from an edit count on."""

    def __init__(self, model, broken_from=10**6):
        super().__init__(model, [1])
        self.broken_from = broken_from

    def compute_update(self, requests):
        weight = self.edited_matrices()[self.language_model.rewrite_name(1)].weight()
        zeros = [weight.new_zeros(size, 1) for size in weight.shape]
        return {self.language_model.rewrite_name(1): LowRankUpdate(*zeros)}, [{} for _ in requests]

    def edit(self, requests):
        report = super().edit(requests)
        if self.num_requests >= self.broken_from:
            self.language_model.rewrite_module(1).weight.data.fill_(math.nan)
        return report


class Half(EditingMeasurement):
    """Scores each case by whether the model is finite."""

    name = "edit/half"
    tasks: ClassVar = {"finite": 0.0}

    def metric(self):
        raise NotImplementedError

    def update(self, metric, model, cases):
        raise NotImplementedError

    def jobs(self, model, cases):
        def job():
            found = success(model, list(cases.values())).accuracy
            rows = [{"case": i, "finite": float(math.isfinite(v))} for i, v in zip(cases, found, strict=True)]
            return Measured({"finite": sum(row["finite"] for row in rows) / len(rows)}, rows)

        return {"half": job}


def follow(module, tmp_path, *callbacks, num_edits=9, done=(), **options):
    scores = StreamScores()
    log = EditLog(tmp_path / "edits.jsonl", scores)
    evaluation = EditEvaluation([2, 4, 6], [Half()], scores, cases_file=tmp_path / "cases.jsonl", **options)
    stream = BundledWorld(num_edits=num_edits, protocol="sequential_batched", batch_size=2, done=done)
    quiet_trainer(log, evaluation, *callbacks).fit(module, datamodule=stream)
    return evaluation


@pytest.mark.parametrize(("num_edits", "counts"), [(5, [0, 2, 4, 5]), (9, [0, 2, 4, 7, 9])])
def test_the_rows_of_a_final_evaluation_that_is_repeated_go(num_edits, counts, tiny, tmp_path):
    """Of a run that was killed before its end was recorded, and of one that is extended."""
    follow(Edits(tiny("gpt2", torch.float32)), tmp_path, EditLedger(tmp_path / "ledger"), num_edits=5)
    (tmp_path / "ledger" / "finish.json").unlink()
    ledger = Ledger.open(tmp_path / "ledger")
    resumed = EditLedger(tmp_path / "ledger", ledger=ledger)
    found = follow(Edits(tiny("gpt2", torch.float32)), tmp_path, resumed, num_edits=num_edits, done=ledger.sizes)
    assert [entry["num_requests"] for entry in found.curve] == counts
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    halves = [(row["num_requests"], row["case"]) for row in rows if row["measurement"] == "edit/half"]
    assert sorted(halves) == [(count, case) for count in counts for case in range(count or num_edits)]


def test_identity_edits_leave_everything_as_it_was(tiny, tmp_path):
    evaluation = follow(Edits(tiny("gpt2", torch.float32)), tmp_path, max_cases=3)
    assert [entry["num_requests"] for entry in evaluation.curve] == [0, 2, 4, 6, 9]
    assert [entry["num_requests"] for entry in evaluation.evaluator.intervals] == [0, 2, 4, 6, 9]
    for entry in evaluation.curve[1:]:
        for form in ("score", "accuracy"):
            for key in ("bwt", "fwt", "forgetting_max", "num_nonfinite"):
                assert math.isnan(entry[f"stream/{form}/{key}"]) or entry[f"stream/{form}/{key}"] == 0.0, key
        assert entry["stream/locality_agreement"] == 1.0
        assert entry["edit/half/retention"] == 1.0
    assert evaluation.curve[-1]["stream/score/bwt"] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["num_requests"] == 9 and row["measurement"] == "edit/half"]
    assert 8 in [row["case"] for row in last]
    assert sum(row["weight"] for row in last) == 9
    assert {"edit/half", "stream", "spectrum"} <= set(evaluation.evaluator.seconds)


def test_a_model_that_turns_nan_fails_from_there_on(tiny, tmp_path):
    evaluation = follow(Edits(tiny("gpt2", torch.float32), broken_from=4), tmp_path)
    by_count = {entry["num_requests"]: entry for entry in evaluation.curve}
    assert by_count[2]["stream/locality_agreement"] == 1.0
    for count in (4, 6, 9):
        entry = by_count[count]
        assert (
            entry["stream/score/final"] == entry["stream/accuracy/final"] == entry["stream/locality_agreement"] == 0.0
        )
        assert entry["stream/score/num_nonfinite"] > 0
        assert entry["edit/half/retention"] == 0.0
    metric = AbilityCurve()
    for count, entry in by_count.items():
        metric.update(count, entry["edit/half/retention"])
    assert float(metric.compute()["edits_to_collapse"]) == 4


def test_a_score_that_is_no_number_is_a_failure_after_a_resume_too(tiny):
    model, cases = tiny("gpt2", torch.float32), {}
    straight, resumed = StreamScores(), StreamScores()
    for scores in (straight, resumed):
        scores.begin(model, cases, [1, 2, 3], [])
    straight.just_after([0], 1, Success([math.nan], [math.nan]))
    straight.just_after([1], 2, Success([math.nan], [1.0]))  # the old target's alone
    straight.just_after([2], 3, Success([None], [1.0]))  # which is not known
    resumed.restore(json.loads(json.dumps(nan_to_null(straight.fresh()))))
    for form, acquired in (("score", 0.0), ("accuracy", 2 / 3)):
        assert straight.figures(form)["acquisition"] == pytest.approx(acquired)
        assert resumed.figures(form) == pytest.approx(straight.figures(form), nan_ok=True)


def test_scores_just_before_and_after_are_not_taken_twice(tiny, tmp_path, monkeypatch):
    scored = []

    def count(model, requests):
        scored.append(len(requests))
        return success(model, requests)

    monkeypatch.setattr("prune_lightning.evaluation.stream.success", count)
    module = Edits(tiny("gpt2", torch.float32))
    evaluation = follow(module, tmp_path)
    # the baseline of 9, then only what was not written in the very batch: 0 of 2, 2 of 4, 4 of 6, 8 of 9
    assert scored == [9, 2, 4, 8]
    entries = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    immediate = np.mean([entry["after"]["accuracy"] for entry in entries])
    assert evaluation.curve[-1]["stream/accuracy/acquisition"] == pytest.approx(immediate)
    assert isinstance(evaluation.evaluator.stream, StreamScores)


def test_two_processes_with_an_odd_number_of_entries_give_the_figures_of_one(tmp_path):
    script = [str(ROOT / "tests" / "stream_entries.py"), str(tmp_path / "figures.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *script]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads((tmp_path / "figures.json").read_text())
    alone = {name: float(value) for name, value in filled(ENTRIES).compute().items()}
    assert both == pytest.approx(alone)
    assert len(ENTRIES) % 2
