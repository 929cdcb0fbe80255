"""Consequences of an edit, as EasyEdit's files and KnowEdit write them down."""

from __future__ import annotations

from typing import Any

from prune_lightning.types import Probe


def portability(row: dict[str, Any]) -> tuple[Probe, ...]:
    """Return the probes of a record's ``portability``, none where it has none.

    Two forms are in use. KnowEdit: lists of ``{"prompt", "ground_truth"}`` by kind, the ground truth a text or lists of
    texts, the first of which is the answer and the others its aliases. EasyEdit's zsRE: one ``New Question`` with its
    ``New Answer``.
    """
    section: dict[str, Any] = row.get("portability") or {}
    if "New Question" in section:
        return (Probe(section["New Question"].rstrip(), section["New Answer"].strip(), "Reasoning"),)
    found = []
    for kind, items in section.items():
        for item in items or ():
            answers = [text.strip() for text in _texts(item["ground_truth"]) if text.strip()]
            if answers:
                found.append(Probe(item["prompt"].rstrip(), answers[0], kind, tuple(answers[1:])))
    return tuple(found)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [text for part in value for text in _texts(part)]
