"""Probes in the formats of EasyEdit and KnowEdit: by kind, each with a prompt and its answers."""

from __future__ import annotations

from prune_lightning.data.fields import Fields
from prune_lightning.types import Probe


def portability(row: Fields) -> tuple[Probe, ...]:
    """Return the probes of a record's ``portability``, or none if it has none.

    Two forms are in use. KnowEdit: lists of ``{"prompt", "ground_truth"}`` by kind, see :func:`by_kind`. EasyEdit's
    zsRE: one ``New Question`` with its ``New Answer``. A probe without an answer cannot be scored and is left out with
        a remark.
    """
    if "portability" not in row:
        return ()
    section = row.object("portability")
    if "New Question" in section.row:
        return (Probe(section.text("New Question"), section.target("New Answer"), "Reasoning"),)
    found = by_kind(section)
    if without := sum(probe.answer is None for probe in found):
        row.notes.append(f"{without} of {len(found)} portability prompts have no answer and are left out")
    return tuple(probe for probe in found if probe.answer)


def locality(row: Fields) -> tuple[Probe, ...]:
    """Return the probes of a record's ``locality``, which are grouped by kind, or none if it has none."""
    return tuple(by_kind(row.object("locality"))) if "locality" in row else ()


def by_kind(section: Fields) -> list[Probe]:
    """Return the probes of an object of lists of ``{"prompt", "ground_truth"}`` (or one such object) by kind.

    The ground truth is a text or lists of texts: the first one is the answer and the others are its aliases.
    """
    found = []
    for kind, value in section.row.items():
        items = [section.object(kind)] if isinstance(value, dict) else section.objects(kind)
        for item in items:
            answers = item.answers("ground_truth")
            found.append(Probe(item.text("prompt"), answers[0] if answers else None, kind, tuple(answers[1:])))
    return found
