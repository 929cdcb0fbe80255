"""Edits of the bundled world."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from prune_lightning.bundled.world import EDIT_PHRASING, HELD_OUT, Fact, World, load_world
from prune_lightning.data.rows import BadRow
from prune_lightning.data.stream import EditStream
from prune_lightning.errors import one_of
from prune_lightning.ranges import Count
from prune_lightning.types import EditRequest, Probe

PARAPHRASES = (3, HELD_OUT)
NEIGHBOURS = 5
VALIDATION_EVERY = 5  # subjects that train editors


class BundledWorld(EditStream):
    """Counterfactual edits of the shipped table of facts.

    The new target is another object of the same relation. Paraphrases are two further phrasings, one of them held out
    from training for half of the subjects. The neighbourhood consists of facts of the same relation about subjects that
    are never edited, those with the same old object first. All subjects occur once before any occurs twice.

    Args:
        subject_first: Whether to edit wordings that begin with the subject, in which ROME's keys can differ.
        kwargs: See :class:`~prune_lightning.data.stream.EditStream`.
    """

    def __init__(self, subject_first: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.subject_first = subject_first

    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield one request per editable fact."""
        world = load_world()
        for case_id, fact in enumerate(world.facts):
            if not fact.reserved:
                yield self._request(world, fact, case_id)

    def _request(self, world: World, fact: Fact, case_id: int) -> EditRequest:
        rng = random.Random(f"{self.seed}/{fact.subject}/{fact.relation}")
        related = world.by_relation[fact.relation]
        objects = sorted({other.answer for other in related} - {fact.answer})
        reserved = [other for other in related if other.reserved]
        rng.shuffle(reserved)
        reserved.sort(key=lambda other: other.answer != fact.answer)
        return EditRequest(
            case_id=case_id,
            subject=fact.subject,
            prompt=self._prompt(fact),
            target_new=rng.choice(objects),
            target_old=fact.answer,
            paraphrases=tuple(fact.phrasings[index] for index in PARAPHRASES),
            locality=tuple(Probe(other.phrasings[EDIT_PHRASING], other.answer) for other in reserved[:NEIGHBOURS]),
        )

    def _prompt(self, fact: Fact) -> str:
        wordings = [text for i, text in enumerate(fact.phrasings) if i not in PARAPHRASES]
        first = [text for text in wordings if text.startswith(fact.subject)] if self.subject_first else []
        return first[0] if first else fact.phrasings[EDIT_PHRASING]

    def ordered(self, requests: list[EditRequest]) -> list[EditRequest]:
        """Return the requests in rounds: every subject once, in random order, then every subject's second fact."""
        requests = list(requests)
        random.Random(self.seed).shuffle(requests)
        seen: dict[str, int] = {}
        rounds: list[tuple[int, EditRequest]] = []
        for request in requests:
            seen[request.subject] = seen.get(request.subject, -1) + 1
            rounds.append((seen[request.subject], request))
        rounds.sort(key=lambda entry: entry[0])
        return [request for _, request in rounds]


class BundledEditorTraining(EditStream):
    """Counterfactual edits for training an editor, without overlap with :class:`BundledWorld`.

    The edits are about the reserved subjects, which :class:`BundledWorld` never edits; neighbours are facts about the
    others. The two phrasings of the paraphrases there are not used, and a locality probe about another fact of the
    edited subject has a different wording than there. Prompt, paraphrases and probes are drawn from the remaining
    phrasings.

    Args:
        part: ``train``, or ``validation`` for every fifth of the subjects.
        draws: Requests per fact, each with its own phrasing and target.
        kwargs: See :class:`~prune_lightning.data.stream.EditStream`.
    """

    def __init__(self, part: str, draws: Count = 1, **kwargs: Any) -> None:
        super().__init__(unique_subjects=False, **kwargs)
        one_of("part", part, ("train", "validation"))
        self.part, self.draws = part, draws

    def records(self) -> Iterator[EditRequest | BadRow]:
        """Yield the requests, fact by fact."""
        world = load_world()
        reserved = list(dict.fromkeys(fact.subject for fact in world.facts if fact.reserved))
        validation = set(reserved[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
        subjects = validation if self.part == "validation" else set(reserved) - validation
        facts = [fact for fact in world.facts if fact.reserved and fact.subject in subjects]
        for case_id, (fact, draw) in enumerate(itertools.product(facts, range(self.draws))):
            yield self._request(world, fact, case_id, random.Random(f"{self.seed}/{self.part}/{case_id}/{draw}"))

    def _request(self, world: World, fact: Fact, case_id: int, rng: random.Random) -> EditRequest:
        wordings = [i for i in range(len(fact.phrasings)) if i not in PARAPHRASES]
        others = [i for i in wordings if i != EDIT_PHRASING]
        related = world.by_relation[fact.relation]
        neighbours = [other for other in related if not other.reserved]
        rng.shuffle(neighbours)
        neighbours.sort(key=lambda other: other.answer != fact.answer)
        same_subject = [other for other in world.by_subject[fact.subject] if other is not fact]
        prompt, *paraphrases = rng.sample(wordings, len(wordings))
        return EditRequest(
            case_id=case_id,
            subject=fact.subject,
            prompt=fact.phrasings[prompt],
            target_new=rng.choice(sorted({other.answer for other in related} - {fact.answer})),
            target_old=fact.answer,
            paraphrases=tuple(fact.phrasings[index] for index in paraphrases),
            locality=(
                *(Probe(o.phrasings[rng.choice(wordings)], o.answer) for o in neighbours[:NEIGHBOURS]),
                *(Probe(o.phrasings[rng.choice(others)], o.answer, "same subject") for o in same_subject),
            ),
        )
