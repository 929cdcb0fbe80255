"""The bundled world: a table of real facts, and the phrasings of each relation."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import yaml

HELD_OUT = 6  # index of the phrasing that is held out from training for half of the subjects
EDIT_PHRASING = 0
RESERVED_EVERY = 3  # every third subject is reserved: used for locality probes and questions, never edited

_TABLES = {"places": ("countries", "cities"), "culture": ("people", "works")}


@dataclass(frozen=True)
class Fact:
    """One cell of the table.

    Args:
        subject: The row's entity.
        relation: ``table.column``.
        answer: The object, a continuation without a leading blank.
        phrasings: Seven beginnings of a sentence about the subject that ``answer`` completes.
        question: A question that ``answer`` answers.
        reserved: Whether the subject is never edited.
        unseen_phrasing: Whether the last phrasing of this fact was held out from training.
    """

    subject: str
    relation: str
    answer: str
    phrasings: tuple[str, ...]
    question: str
    reserved: bool
    unseen_phrasing: bool

    def statements(self) -> list[str]:
        """Return the sentences of the training text that state this fact."""
        seen = self.phrasings[:HELD_OUT] if self.unseen_phrasing else self.phrasings
        return [f"{phrasing} {self.answer}." for phrasing in seen]


@dataclass(frozen=True)
class World:
    """All facts, in the order of the tables.

    Args:
        facts: One entry per subject and relation.
    """

    facts: tuple[Fact, ...]

    @cached_property
    def by_relation(self) -> dict[str, list[Fact]]:
        """Facts grouped by relation."""
        return self._grouped("relation")

    @cached_property
    def by_subject(self) -> dict[str, list[Fact]]:
        """Facts grouped by subject."""
        return self._grouped("subject")

    def _grouped(self, name: str) -> dict[str, list[Fact]]:
        groups: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            groups[getattr(fact, name)].append(fact)
        return dict(groups)

    @cached_property
    def subjects(self) -> list[str]:
        """Every subject once."""
        return list(self.by_subject)


def _rows(table: str) -> list[dict[str, str]]:
    text = resources.files(__package__).joinpath("world", f"{table}.tsv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def load_world() -> World:
    """Read the tables that are shipped with the package."""
    facts = []
    position = 0
    for sheet, tables in _TABLES.items():
        source = resources.files(__package__).joinpath("world", f"{sheet}.yaml").read_text("utf-8")
        wording: dict[str, Any] = yaml.safe_load(source)
        for table in tables:
            for row in _rows(table):
                subject = row.pop("subject")
                for relation, answer in row.items():
                    words = wording[table][relation]
                    facts.append(
                        Fact(
                            subject=subject,
                            relation=f"{table}.{relation}",
                            answer=answer,
                            phrasings=tuple(phrasing.format(subject) for phrasing in words["phrasings"]),
                            question=words["question"].format(subject),
                            reserved=position % RESERVED_EVERY == RESERVED_EVERY - 1,
                            unseen_phrasing=position % 2 == 0,
                        )
                    )
                position += 1
    return World(tuple(facts))
