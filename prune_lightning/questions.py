"""Questions about the consequences of edits, asked once all edits of a group are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """A prompt that a model has to continue with an answer.

    Args:
        prompt: Its text.
        answers: What the answer has to hold: one name of every entry, e.g. ``(("Paris", "Lutetia"),)``.
    """

    prompt: str
    answers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Question:
    """A test of one consequence.

    Args:
        kind: What it tests, e.g. ``multi_hop``; scores are averaged by kind.
        queries: Its queries.
        every: Whether all of them have to be answered correctly, or one.
        given: Queries that the unedited model has to answer correctly; else the question does not count.
    """

    kind: str
    queries: tuple[Query, ...]
    every: bool = False
    given: tuple[Query, ...] = ()


@dataclass(frozen=True)
class Group:
    """Edits that belong together, and the questions about them.

    Args:
        name: Identifier of the record in its source.
        facts: Prompt and new target of each edit. A fact can belong to several groups.
        questions: Questions that follow from all of them.
    """

    name: int | str
    facts: tuple[tuple[str, str], ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class PlacedGroup:
    """A group in a stream that writes at least one of its edits.

    Args:
        group: The group.
        case: Index of the request that completes it; ``None`` if the stream lacks one of its edits, or if each step
            starts from the unedited model and no step has all of them.
        until: Edit count from which on a later request has overwritten one of its edits; ``None`` for never.
    """

    group: Group
    case: int | None
    until: int | None = None
