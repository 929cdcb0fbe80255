"""What the bundled world, abilities and model promise."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import ROOT

from prune_lightning.bundled.abilities import abilities, plain_text
from prune_lightning.bundled.corpus import training_documents
from prune_lightning.bundled.world import HELD_OUT, load_world
from prune_lightning.data.bundled import BundledWorld
from prune_lightning.evaluation.miniature import MiniatureAbilities
from prune_lightning.tasks.pretrain import recall

WORLD = load_world()


def test_world_is_as_large_as_promised():
    assert len(WORLD.subjects) >= 300
    assert len(WORLD.facts) >= 1500
    assert set(Counter(fact.subject for fact in WORLD.facts).values()) == {5}
    assert all(len(set(fact.phrasings)) == 7 for fact in WORLD.facts)


def test_phrasings_hold_their_subject_and_are_distinct():
    owners: dict[str, str] = {}
    for fact in WORLD.facts:
        assert all(fact.subject in phrasing and phrasing == phrasing.strip() for phrasing in fact.phrasings)
        for phrasing in fact.phrasings:
            assert owners.setdefault(phrasing, fact.relation) == fact.relation


def test_one_phrasing_is_held_out_for_half_of_the_subjects():
    documents = set(training_documents()["facts"])
    unseen = {fact.subject for fact in WORLD.facts if fact.unseen_phrasing}
    assert len(unseen) == pytest.approx(len(WORLD.subjects) / 2, abs=1)
    for fact in WORLD.facts:
        assert (f"{fact.phrasings[HELD_OUT]} {fact.answer}." in documents) is not fact.unseen_phrasing


def test_ability_items_are_enough_and_disjoint_from_training():
    trained = {text for texts in training_documents().values() for text in texts}
    for name, task in {**abilities(WORLD), "text": plain_text()}.items():
        assert len(task.test) >= 100, name
        assert not trained & {item.text() for item in task.test}, name


def test_questions_and_neighbours_are_about_subjects_that_are_never_edited():
    stream = BundledWorld(num_edits=None)
    stream.setup()
    edited = {request.subject for request in stream.requests}
    reserved = {fact.subject for fact in WORLD.facts if fact.reserved}
    assert not edited & reserved
    questions = {item.prompt for item in abilities(WORLD)["qa"].test}
    asked = {fact.subject for fact in WORLD.facts if f"Question: {fact.question} Answer:" in questions}
    assert asked <= reserved
    known = {fact.phrasings[0]: fact for fact in WORLD.facts}
    for request in stream.requests:
        assert request.target_new != request.target_old
        assert len(request.paraphrases) >= 2
        assert len(request.locality) == 5
        assert all(
            known[probe.prompt].reserved and known[probe.prompt].answer == probe.answer for probe in request.locality
        )


def test_model_is_small_and_scores_what_its_card_promises(bundled_shared):
    files = list((ROOT / "prune_lightning" / "bundled" / "model").iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    assert all(score > 0.95 for score in recall(bundled_shared).values())
    for name, score in MiniatureAbilities().measure(bundled_shared).scores.items():
        assert score < 4 if name == "perplexity" else score >= 0.85, name
