"""RippleEdits (Cohen et al., 2024, https://arxiv.org/abs/2307.12976): six criteria of what else an edit changes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prune_lightning.data.fields import Fields
from prune_lightning.data.grouped import GroupedFile
from prune_lightning.errors import UserError, shown
from prune_lightning.questions import Query, Question
from prune_lightning.types import EditRequest

CRITERIA = {
    "Relation_Specificity": "Relation_Specificity",
    "Relation_Specifity": "Relation_Specificity",  # the spelling of the published files
    "Logical_Generalization": "Logical_Generalization",
    "Subject_Aliasing": "Subject_Aliasing",
    "Compositionality_I": "Compositionality_I",
    "Compositionality_II": "Compositionality_II",
    "Forgetfulness": "Forgetfulness",
}
_CONDITIONS = {"AND": True, "OR": False}
_OPENER = r"\b(?:of|in|by|which|children|award)\s+"
_CLOSER = r"\s+(?:is|are|has|won|plays)\b"


class RippleEdits(GroupedFile):
    """Edits given as sentences, with tests by criterion.

    A test passes if one (``OR``) or all (``AND``) of its ``test_queries`` are answered correctly. It counts only if the
    unedited model answers its ``condition_queries``.

    The files name the subject by its Wikidata id alone. It is the longest part of the edit's sentence that the prompts
    of the tests about the same id share, or ``edit.subject`` where a record has that key. The target is what follows
    the last "is" or "are" that the sentence has in common with that of the original fact.
    """

    def parse_group(self, row: Fields, case_id: int) -> tuple[Sequence[EditRequest], Sequence[Question]]:
        """Convert one record."""
        edit = row.object("edit")
        sentence = edit.text("prompt").strip()
        original = edit.object("original_fact").text("prompt").strip() if "original_fact" in edit else None
        end = _prompt_end(sentence, original or sentence)
        if end is None:
            raise UserError(f"`edit.prompt` {shown(sentence)} has no 'is' or 'are' before its target")
        tests = [(kind, test) for key, kind in CRITERIA.items() for test in row.objects(key)]
        prompt = sentence[:end]
        subject = edit.optional("subject") or _subject(row, prompt, edit, tests)
        request = EditRequest(
            case_id=row.row.get("case_id", case_id),
            subject=subject,
            prompt=prompt,
            target_new=_target(sentence, end),
            target_old=_target(original, end) if original else None,
            subject_start=row.place(subject, prompt),
        )
        return [request], [_question(kind, test) for kind, test in tests]


def _prompt_end(sentence: str, other: str) -> int | None:
    """Return the end of the last "is" or "are" before which two sentences agree word for word."""
    common = 0
    for word, its in zip(re.finditer(r"\S+", sentence), re.finditer(r"\S+", other), strict=False):
        if word.group() != its.group():
            break
        common = word.end()
    ends = [found.end() for found in re.finditer(r"\b(?:is|are)(?=\s)", sentence) if found.end() <= common]
    return ends[-1] if ends else None


def _target(sentence: str, end: int) -> str:
    return sentence[end:].strip().removesuffix(".")


def _subject(row: Fields, prompt: str, edit: Fields, tests: Sequence[tuple[str, Fields]]) -> str:
    """Return the subject of a prompt: the candidate in most prompts about the same id, the longest of these."""
    openers = [found.end() for found in re.finditer(_OPENER, prompt)]
    closers = [found.start() for found in re.finditer(_CLOSER, prompt)]
    candidates = [prompt[start:end] for start in openers for end in closers if start < end]
    if not candidates:
        raise UserError(f"the subject of `edit.prompt` {shown(prompt)} cannot be found; add it as `edit.subject`")
    queries = [query for kind, test in tests if kind != "Subject_Aliasing" for query in test.objects("test_queries")]
    prompts = {
        query.text("prompt")
        for query in queries
        if query.row.get("subject_id") == edit.row.get("subject_id")
        and query.row.get("relation") != edit.row.get("relation")
    }
    if not prompts:
        subject = min(candidates, key=len)
        row.notes.append(f"no test has another prompt about the subject; it is taken to be {shown(subject)}")
        return subject
    return max(candidates, key=lambda text: (sum(text in other for other in prompts), len(text)))


def _question(kind: str, row: Fields) -> Question:
    condition = row.text("test_condition")
    if condition not in _CONDITIONS:
        raise row.wrong("test_condition", "AND or OR", condition)
    queries = tuple(_query(query) for query in row.objects("test_queries"))
    given = tuple(_query(query) for query in row.objects("condition_queries"))
    return Question(kind, queries, _CONDITIONS[condition], given)


def _query(row: Fields) -> Query:
    answers = [(answer.text("value"), *answer.texts("aliases")) for answer in row.objects("answers")]
    # Of one letter, an alias is part of almost any text; the published code leaves these out as well.
    kept = [tuple(name for name in names if len(name) > 1 or name.isdigit()) for names in answers]
    return Query(row.text("prompt"), tuple(names for names in kept if names))
