"""Edits of the bundled world."""

from __future__ import annotations

import random
from collections.abc import Iterator

from prune_lightning.bundled.world import EDIT_PHRASING, HELD_OUT, Fact, World, load_world
from prune_lightning.data.stream import BadRow, EditStream
from prune_lightning.types import EditRequest, Probe

PARAPHRASES = (3, HELD_OUT)
NEIGHBOURS = 5


class BundledWorld(EditStream):
    """Counterfactual edits of the shipped table of facts.

    The new target is another object of the same relation. Paraphrases are two further phrasings, one of them held out
    from training for half of the subjects. The neighbourhood holds facts of the same relation about subjects that no
    edit touches, those with the same old object first. Each subject comes once before any comes a second time.
    """

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
            prompt=fact.phrasings[EDIT_PHRASING],
            target_new=rng.choice(objects),
            target_old=fact.answer,
            paraphrases=tuple(fact.phrasings[index] for index in PARAPHRASES),
            locality=tuple(Probe(other.phrasings[EDIT_PHRASING], other.answer) for other in reserved[:NEIGHBOURS]),
        )

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
