"""Scores of an editor's edits, before and after them."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.utils import instantiate

from prune_lightning.editor.results import Answers, Scores
from prune_lightning.editor.session import EditSession
from prune_lightning.evaluation.answers import Answers as AskedAnswers
from prune_lightning.evaluation.evaluator import Evaluator
from prune_lightning.evaluation.measurement import EditingMeasurement, Measured
from prune_lightning.report.labels import Labels
from prune_lightning.tasks.recipe import evaluation_options
from prune_lightning.types import EditRequest


def scores_of(session: EditSession, requests: Sequence[EditRequest], answers: Answers) -> Scores:
    """Score edits of a session on the unedited and on the edited model.

    Args:
        session: The session.
        requests: The edits.
        answers: The answers to the prompts of these edits, for the result.
    """
    found = [instantiate(entry, _convert_="all") for entry in evaluation_options("editing")]
    scored = [m for m in found if isinstance(m, EditingMeasurement) and not isinstance(m, AskedAnswers)]
    evaluator = Evaluator(scored, clock=session.clock)
    cases = dict(enumerate(requests))
    model = session.language_model
    with session.unedited():
        before = evaluator.take_baseline(model, cases, _no_spectrum)
    after = evaluator.evaluate(
        model, cases, dict.fromkeys(cases, 1.0), len(cases), evaluator.measurements, _no_spectrum, 1
    )
    return Scores(before, after, len(cases), Labels(evaluator.labels()), answers)


def _no_spectrum() -> Measured:
    return Measured({})
