"""The legacy tasks: a file of records, a prompt, a few greedy tokens, and a scorer for each kind.

The bugs of the papers' code are not reproduced: its scorer of questions lets one hit change how later items are matched
and counts an item more than once, its summaries lose their last 13 characters (the length of GPT-2's end token), and
its entities are cut short, merged, or empty.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchmetrics.functional.text import bleu_score

from prune_lightning.errors import UserError
from prune_lightning.metrics import MeanRouge
from prune_lightning.metrics.functional import constant_score, normalise_answer
from prune_lightning.ranges import Count
from prune_lightning.records import Row, read_objects, read_table, read_text

Parts = dict[str, float]
"""Scores by the suffix of the task's name; the main score has an empty suffix."""


@dataclass(frozen=True)
class LegacyItem:
    """A prompt and its correct answers.

    Args:
        case: Number of the record in its file.
        prompt: The whole prompt.
        gold: The correct answers, in the scorer's form; any of them is right.
        kind: The kind of answer, where the task has several.
    """

    case: int
    prompt: str
    gold: tuple[str, ...]
    kind: str = ""


@dataclass
class LegacyTask(ABC):
    """A task: its file of records, its prompt, and its scorer.

    Args:
        path: Its file; ``None`` leaves the task out.
        prompt: Template in which ``{key}`` is replaced by a record's entry.
        max_new_tokens: Tokens to generate.
        gold: Key of a record's answer.
        max_items: Largest number of items; ``None`` for all.
        after: Score only the part of the continuation after the last occurrence of this text.
    """

    path: str | None
    prompt: str
    max_new_tokens: Count
    gold: str
    max_items: Count | None = None
    after: str | None = None

    def read(self, name: str) -> list[LegacyItem]:
        """Return the items of the task's file.

        Args:
            name: The task, for messages.

        Raises:
            UserError: A record cannot be used; the message has the line and the reason.
        """
        path = Path(self.path or "").expanduser()
        found: list[LegacyItem] = []
        for case, (file, (line, row)) in enumerate(self.rows(path)):
            where = f"{name}: {str(file)!r}, line {line}"
            try:
                if isinstance(row, str):
                    raise UserError(row)
                found += self.items(case, row)
            except KeyError as error:
                raise UserError(f"{where}: the key {error} is missing") from error
            except (UserError, TypeError, AttributeError, IndexError, ValueError) as error:
                raise UserError(f"{where}: {error}") from error
            if self.max_items is not None and len(found) >= self.max_items:
                break
        if not found:
            raise UserError(f"{name}: {str(path)!r} holds no item")
        return found[: self.max_items]

    def rows(self, path: Path) -> Iterator[tuple[Path, Row]]:
        """Yield the records of a TSV, JSON or JSONL file, or of a folder with one object per file."""
        files = path.iterdir() if path.is_dir() else [path]
        for file in sorted(files, key=lambda f: [int(number) for number in re.findall(r"\d+", f.name)]):
            for row in read_table(file) if file.suffix == ".tsv" else read_objects(file):
                yield file, row

    def items(self, case: int, row: Mapping[str, Any]) -> list[LegacyItem]:
        """Convert a record into its items, usually one."""
        return [LegacyItem(case, self.prompt.format_map(row), self.answers(row[self.gold]))]

    def answers(self, gold: Any) -> tuple[str, ...]:
        """Return a record's answers in the scorer's form."""
        texts = [str(text).strip() for text in (gold if isinstance(gold, list) else [gold])]
        found = tuple(text for text in texts if text)
        if not found:
            raise UserError(f"the answer {gold!r} is empty")
        return found

    def score(self, text: str, item: LegacyItem) -> Parts:
        """Score a continuation.

        Args:
            text: The new tokens' text; empty where the logits were not finite.
            item: The item.
        """
        return self.judge(text.split(self.after)[-1].strip() if self.after else text, item)

    @abstractmethod
    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Score an answer; a part that does not apply to this item is left out."""

    def chance(self, items: Sequence[LegacyItem]) -> float:
        """Return the score of guessing: of giving each item the right answer of another one."""
        half = len(items) // 2
        others = [*items[half:], *items[:half]]
        judged = [self.judge(other.gold[0], item) for item, other in zip(items, others, strict=True)]
        return self.summary(judged)[""]

    def summary(self, judged: Sequence[Parts]) -> Parts:
        """Return the mean of each part over the items that have it."""
        names = dict.fromkeys(name for parts in judged for name in parts)
        return {name: mean(parts[name] for parts in judged if name in parts) for name in names}


class NumberAfterSolution(LegacyTask):
    """GSM8K: the answer's digits occur in the continuation of the worked solution, so ``5`` is found in ``15``.

    The prompt's ``{solution}`` is the part of the record's answer before ``####``.
    """

    def items(self, case: int, row: Mapping[str, Any]) -> list[LegacyItem]:
        """Split the record's answer into solution and number."""
        solution, mark, number = row[self.gold].partition("#### ")
        if not mark:
            raise UserError(f"the answer {row[self.gold]!r} has no '#### ' before its number")
        return [LegacyItem(case, self.prompt.format_map({**row, "solution": solution}), self.answers(number))]

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Search for the number."""
        return {"": float(item.gold[0] in text)}


class Summary(LegacyTask):
    """SAMSum: the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L on unprocessed words; ``bleu`` is sentence-level BLEU-4.

    Words are split at blanks, neither lower-cased nor stripped of punctuation, as by the package ``rouge``.
    """

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Compare with the reference summary."""
        metric = MeanRouge(normalizer=str, tokenizer=str.split, sync_on_compute=False)
        metric.update([text], [item.gold[0]])
        return {"": float(metric.compute()), "bleu": float(bleu_score([text], [[item.gold[0]]], n_gram=4))}


class AnswerSpan(LegacyTask):
    """NQ-open: the answer, normalised as in SQuAD, contains one of the aliases as whole words."""

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Search for the aliases."""
        answer = f" {normalise_answer(text)} "
        return {"": float(any(f" {alias} " in answer for alias in map(normalise_answer, item.gold) if alias))}


@dataclass
class Choice(LegacyTask):
    """RTE, BoolQ, SST-2, MuTual: the answer names the right label.

    An answer that names none of the labels is a failure, counted in ``unparsable``; ``parsed`` is the accuracy among
    the others, zero if there are none.

    Args:
        labels: The expected answer for each value of the record's label.
        whole: Whether the label has to be the whole answer; otherwise the answer has to contain it.
        ignore_case: Whether case is ignored.
    """

    labels: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    ignore_case: bool = False

    def answers(self, gold: Any) -> tuple[str, ...]:
        """Return the expected answer."""
        if str(gold) not in self.labels:
            raise UserError(f"the label {gold!r} is none of {', '.join(map(repr, self.labels))}")
        return (self.labels[str(gold)],)

    def chance(self, items: Sequence[LegacyItem]) -> float:
        """Return the score of the commonest label."""
        return constant_score([item.gold[0] for item in items])

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Find the labels that the answer names."""
        answer = text.lower() if self.ignore_case else text
        named = {label for label in self.labels.values() if (label == answer if self.whole else label in answer)}
        hit = float(item.gold[0] in named)
        return {"": hit, "unparsable": float(not named), **({"parsed": hit} if named else {})}

    def summary(self, judged: Sequence[Parts]) -> Parts:
        """Return the means."""
        return {"parsed": 0.0, **super().summary(judged)}


@dataclass
class EntityRecall(LegacyTask):
    """CoNLL03: the score is the recall of a sentence's entities in the answer about their type.

    It is averaged over types. (RECT calls it F1, but it does not include precision.) The file has one word per line,
    with its label last, and a blank line after each sentence; the prompt has ``{type}`` and ``{text}``.

    Args:
        types: Name in the prompt of each label's suffix, such as ``PER`` in ``B-PER``.
    """

    types: dict[str, str] = field(default_factory=dict)

    def rows(self, path: Path) -> Iterator[tuple[Path, Row]]:
        """Yield the sentences."""
        words: list[tuple[str, str]] = []
        start = 1
        for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
            cells = line.split()
            if cells and cells[0] != "-DOCSTART-":
                start = start if words else number
                words.append((cells[0], cells[-1]))
            elif words:
                yield path, (start, {self.gold: words})
                words = []

    def items(self, case: int, row: Mapping[str, Any]) -> list[LegacyItem]:
        """Return one item for each entity."""
        words: list[tuple[str, str]] = row[self.gold]
        text = "".join(word if word in (",", ".") else f" {word}" for word, _ in words).strip()
        found = []
        for ending, entity in entities(words):
            if ending not in self.types:
                raise UserError(f"the label of type {ending!r} is none of {', '.join(self.types)}")
            name = self.types[ending]
            found.append(LegacyItem(case, self.prompt.format(type=name, text=text), (entity,), name.lower()))
        return found

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Search for the entity."""
        return {item.kind: float(item.gold[0] in text)}

    def summary(self, judged: Sequence[Parts]) -> Parts:
        """Return the recall of each type, and their mean."""
        scores = super().summary(judged)
        return {"": mean(score for name, score in scores.items() if name != "nonfinite"), **scores}


def entities(words: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return ``(type, text)`` of each entity in words with BIO labels.

    >>> entities([("New", "B-LOC"), ("York", "I-LOC"), ("Yankees", "B-ORG"), ("win", "O")])
    [('LOC', 'New York'), ('ORG', 'Yankees')]
    """
    found: list[tuple[str, list[str]]] = []
    before = ""
    for word, label in words:
        position, _, ending = label.partition("-")
        if position == "B" or (position == "I" and ending != before):
            found.append((ending, []))
        if ending:
            found[-1][1].append(word)
        before = ending
    return [(ending, " ".join(parts)) for ending, parts in found]


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean."""
    listed = list(values)
    return sum(listed) / len(listed)
