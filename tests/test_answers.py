"""What the model says after the prompts of the edits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from prune_lightning.evaluation.answers import Answers, Question
from prune_lightning.evaluation.evaluator import Evaluator
from prune_lightning.evaluation.measurement import Measured, Measurement
from prune_lightning.evaluation.scoring import greedy_continuations
from prune_lightning.models.kept_results import KeptResults
from prune_lightning.text.separators import TextPair
from prune_lightning.types import EditRequest, Probe

FRANCE = EditRequest(
    0, "France", "The capital of France is", "Rome", "Paris",
    paraphrases=("The city that serves as the capital of France is", "France has its capital in"),
    locality=(Probe("The capital of Italy is"), Probe("The capital of Spain is", "Madrid"), Probe("x", "y")),
)  # fmt: skip


def test_answers_are_greedy_and_those_of_the_edits_prompts(bundled_shared):
    unknown = EditRequest(1, "Italy", "The capital of Italy is", "Paris")
    asked = Answers(max_probes=1)
    asked.take_reference(bundled_shared, {})
    before = asked.measure(bundled_shared, {0: FRANCE, 1: unknown})
    assert before.scores == {}
    assert before.cases[0] == {"case": 0, "now": None, "paraphrases": [], "locality": []}  # its old answer is given
    (italian,) = greedy_continuations(bundled_shared, ["The capital of Italy is"], 8, ".")
    assert before.cases[1]["now"] == italian.rstrip(".") == "Rome"
    (row,) = asked.measure(bundled_shared, {7: FRANCE}).cases
    assert row == {"case": 7, "now": "Paris", "paraphrases": ["Paris"], "locality": ["Madrid"]}
    (several,) = Answers(max_probes=2).measure(bundled_shared, {0: FRANCE}).cases
    assert [len(several["paraphrases"]), len(several["locality"])] == [2, 2]
    (none,) = Answers(max_probes=0).measure(bundled_shared, {0: FRANCE}).cases
    assert (none["now"], none["paraphrases"], none["locality"]) == ("Paris", [], [])


def test_an_answer_ends_with_its_sentence_unless_a_full_stop_may_be_expected():
    plain = Question("now", (TextPair("It is", " Rome."),))
    assert plain.cut(" Rome. And so") == "Rome"
    saint = Question("now", (TextPair("It is", " St. Louis"), TextPair("It is", " Rome")))
    assert saint.cut(" St. Louis in") == "St. Louis in"


class Coin(Measurement):
    """Scores of given cases."""

    name = "ability/coin"

    def __init__(self, values):
        super().__init__()
        self.values = values

    def jobs(self, model, cases):
        rows = [{"case": i, "heads": value} for i, value in enumerate(self.values)]
        return {"coin": lambda: Measured({"heads": sum(self.values) / len(self.values)}, rows)}


def evaluated(values):
    evaluator = Evaluator([Coin(values)])
    evaluator.evaluate(SimpleNamespace(kept=KeptResults()), {}, {}, 0, evaluator.measurements, lambda: Measured({}), 1)
    return evaluator


def test_difference_between_two_runs_is_that_of_paired_cases():
    mine, theirs = [1.0, 1.0, 0.0, 1.0] * 10, [0.0, 1.0, 0.0, 0.0] * 10
    ours, other = evaluated(mine), evaluated(theirs)
    assert ours.num_cases == {"ability/coin/heads": 40}
    value, low, high = ours.difference(other)["ability/coin/heads"]
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=1000) @ (np.subtract(mine, theirs)) / 40
    assert value == pytest.approx(0.5)
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert evaluated(mine).difference(evaluated(theirs[:20])) == {}  # other cases
