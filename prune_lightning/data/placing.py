"""Where the groups of edits with questions of their own are complete in a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prune_lightning.questions import Group, PlacedGroup
from prune_lightning.types import EditBatch


def placed(groups: Sequence[Group], steps: Sequence[EditBatch], superseded: Mapping[int, int]) -> list[PlacedGroup]:
    """Return the groups of which a stream writes an edit, with the request that completes each.

    Args:
        groups: The groups.
        steps: The steps of the stream. If they start from the unedited model, one step has to hold all edits of a
            group; the first such step counts.
        superseded: By a request's index, the edit count from which on it is overwritten.
    """
    requests = [request for step in steps for request in step.requests]
    first: dict[tuple[str, str], int] = {}
    for place, request in reversed(list(enumerate(requests))):
        first[request.fact] = place
    found: list[PlacedGroup] = []
    for group in groups:
        places = [first[fact] for fact in group.facts if fact in first]
        if places and any(step.from_base for step in steps):
            found.append(_within_steps(group, steps))
        elif len(places) < len(group.facts):
            if places:
                found.append(PlacedGroup(group, None))
        else:
            ends = [superseded[place] for place in places if place in superseded]
            found.append(PlacedGroup(group, max(places), min(ends) if ends else None))
    return found


def _within_steps(group: Group, steps: Sequence[EditBatch]) -> PlacedGroup:
    start = 0
    for step in steps:
        here = {request.fact: start + i for i, request in enumerate(step.requests)}
        if all(fact in here for fact in group.facts):
            return PlacedGroup(group, max(here[fact] for fact in group.facts))
        start += len(step.requests)
    return PlacedGroup(group, None)
