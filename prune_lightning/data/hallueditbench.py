"""HalluEditBench (Huang et al., 2025, https://arxiv.org/abs/2410.16251): facts that a given model gets wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from prune_lightning.data.fields import Fields
from prune_lightning.data.grouped import GroupedFile
from prune_lightning.data.rows import BadRow, Located
from prune_lightning.errors import UserError, near_path
from prune_lightning.questions import Query, Question
from prune_lightning.records import Row, read_csv
from prune_lightning.types import EditRequest, Probe

_HOPS = range(2, 7)


class HalluEditBench(GroupedFile):
    """One CSV file, i.e. one topic, or a folder of them, i.e. all topics of one model.

    ``question``, ``subject`` and ``object`` make the edit. The model's own wrong answer (``output_MODEL``) is the old
    target. ``paraphrased_question`` is a paraphrase and ``locality_question`` an unrelated question without a known
    answer. Questions with an answer of their own are asked after the edit: ``yes``, ``no``, ``multiple_choice``,
    ``reversed_relation`` and ``2_hop`` to ``6_hop``.
    """

    def located(self) -> Iterator[Located | BadRow]:
        """Yield requests and bad rows in the files' order; in a folder, the reason of a bad row names its file."""
        found = super().located()
        yield from self._named(found) if self.path.is_dir() else found

    def _named(self, found: Iterator[Located | BadRow]) -> Iterator[Located | BadRow]:
        for one in found:
            yield BadRow(one.line, f"{self._file}: {one.reason}") if isinstance(one, BadRow) else one

    def read_file(self) -> Iterator[Row]:
        """Yield the rows of the file, or of all files of the folder."""
        files = sorted(self.path.glob("*.csv")) if self.path.is_dir() else [self.path]
        if not files:
            raise UserError(f"data.path={self.path} holds no CSV file; {near_path(self.path)}")
        return chain.from_iterable(self._rows(file) for file in files)

    def _rows(self, file: Path) -> Iterator[Row]:
        self._file = file.name
        yield from read_csv(file)

    def parse_group(self, row: Fields, case_id: int) -> tuple[Sequence[EditRequest], Sequence[Question]]:
        """Convert one row."""
        subject, prompt, target = row.stripped("subject"), row.text("question"), row.target("object")
        asked = row.optional("locality_question")
        request = EditRequest(
            case_id=case_id,
            subject=subject,
            prompt=prompt,
            target_new=target,
            target_old=_old(row, target),
            paraphrases=(row.text("paraphrased_question"),) if row.optional("paraphrased_question") else (),
            locality=(Probe(asked, None, "unrelated"),) if asked else (),
            subject_start=row.place(subject, prompt),
        )
        return [request], list(_questions(row, prompt, subject))


def _old(row: Fields, target: str) -> str | None:
    """Return the model's answer; ``None`` if there is none, or several models', or one that is the target."""
    outputs = [key for key in row.row if key.startswith("output_")]
    answer = row.optional_target(outputs[0]) if len(outputs) == 1 else None
    return None if answer == target else answer


def _questions(row: Fields, prompt: str, subject: str) -> Iterator[Question]:
    choices = row.optional("multiple_choice_with_letters")
    asked = {
        "yes": (row.optional("yes_question"), "Yes"),
        "no": (row.optional("no_question"), "No"),
        "multiple_choice": (choices and f"{prompt} {choices}", row.optional("multiple_choice_labels")),
        "reversed_relation": (row.optional("reversed_relation_question"), subject),
    }
    for hops in _HOPS:
        asked[f"{hops}_hop"] = (row.optional(f"question_{hops}hop"), _number_or_text(row, f"answer_{hops}hop"))
    for kind, (text, answer) in asked.items():
        if text and answer:
            yield Question(kind, (Query(text, ((answer,),)),))


def _number_or_text(row: Fields, key: str) -> str | None:
    """Return an answer, which ``datasets`` reads as a number where all answers of a column are numbers."""
    value = row.row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None if value != value else f"{value:g}"
    return row.optional(key)
