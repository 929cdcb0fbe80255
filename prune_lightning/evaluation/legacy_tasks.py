"""What the legacy tasks are made of: a file of records, a prompt, a few greedy tokens, and a scorer for each kind.

The bugs of the papers' code are not repeated: its reader of questions lets one hit change how later items are matched
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
from prune_lightning.metrics.functional import normalise_answer
from prune_lightning.records import Row, read_objects, read_table, read_text

Parts = dict[str, float]
"""Scores by what is added to the task's name; its own score has nothing added."""


@dataclass(frozen=True)
class LegacyItem:
    """A prompt and what counts as the answer.

    Args:
        case: Number of the record in its file.
        prompt: The whole prompt.
        gold: The answer, in the scorer's terms; several where each of them will do.
        kind: Which sort of answer is asked for, where the task has several.
    """

    case: int
    prompt: str
    gold: tuple[str, ...]
    kind: str = ""


@dataclass
class LegacyTask(ABC):
    """A task: where its records lie, how they are asked, and how the answers are scored.

    Args:
        path: Its file; ``None`` leaves the task out.
        prompt: Template in which ``{key}`` stands for a record's entry.
        max_new_tokens: Tokens to generate.
        gold: Key of a record's answer.
        max_items: Use at most so many items; ``None`` for all.
        after: Of the continuation only what follows the last occurrence of this text is scored.
    """

    path: str | None
    prompt: str
    max_new_tokens: int
    gold: str
    max_items: int | None = None
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
        """Yield the records of a file: TSV by its ending, else JSON or JSONL; of a folder, one object a file."""
        files = path.iterdir() if path.is_dir() else [path]
        for file in sorted(files, key=lambda f: [int(number) for number in re.findall(r"\d+", f.name)]):
            for row in read_table(file) if file.suffix == ".tsv" else read_objects(file):
                yield file, row

    def items(self, case: int, row: Mapping[str, Any]) -> list[LegacyItem]:
        """Turn a record into its items, mostly one."""
        return [LegacyItem(case, self.prompt.format_map(row), self.answers(row[self.gold]))]

    def answers(self, gold: Any) -> tuple[str, ...]:
        """Return a record's answer in the scorer's terms."""
        texts = [str(text).strip() for text in (gold if isinstance(gold, list) else [gold])]
        found = tuple(text for text in texts if text)
        if not found:
            raise UserError(f"the answer {gold!r} is empty")
        return found

    def score(self, text: str, item: LegacyItem) -> Parts:
        """Score a continuation.

        Args:
            text: The new tokens' text; empty where the logits were not finite.
            item: What was asked.
        """
        return self.judge(text.split(self.after)[-1].strip() if self.after else text, item)

    @abstractmethod
    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Score an answer; a part that does not apply to this item is left out."""

    def summary(self, judged: Sequence[Parts]) -> Parts:
        """Return the mean of each part over the items that have it."""
        names = dict.fromkeys(name for parts in judged for name in parts)
        return {name: mean(parts[name] for parts in judged if name in parts) for name in names}


class NumberAfterSolution(LegacyTask):
    """GSM8K: the answer's digits occur in what is said after the worked solution, so that ``5`` is found in ``15``.

    The prompt's ``{solution}`` is what stands before ``####`` in the record's answer.
    """

    def items(self, case: int, row: Mapping[str, Any]) -> list[LegacyItem]:
        """Divide the record's answer into solution and number."""
        solution, mark, number = row[self.gold].partition("#### ")
        if not mark:
            raise UserError(f"the answer {row[self.gold]!r} has no '#### ' before its number")
        return [LegacyItem(case, self.prompt.format_map({**row, "solution": solution}), self.answers(number))]

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Look for the number."""
        return {"": float(item.gold[0] in text)}


class Summary(LegacyTask):
    """SAMSum: the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L on words as they stand; ``bleu`` is BLEU-4 by sentence.

    Words are split at blanks, neither lower-cased nor stripped of punctuation, as by the package ``rouge``.
    """

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Compare with the reference summary."""
        metric = MeanRouge(normalizer=str, tokenizer=str.split, sync_on_compute=False)
        metric.update([text], [item.gold[0]])
        return {"": float(metric.compute()), "bleu": float(bleu_score([text], [[item.gold[0]]], n_gram=4))}


class AnswerSpan(LegacyTask):
    """NQ-open: some words in a row of the answer, normalised as in SQuAD, are one of the aliases."""

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """Look for an alias among the words."""
        said = f" {normalise_answer(text)} "
        return {"": float(any(f" {alias} " in said for alias in map(normalise_answer, item.gold) if alias))}


@dataclass
class Choice(LegacyTask):
    """RTE, BoolQ, SST-2, MuTual: the answer names the right label.

    An answer that names none of the labels is a failure, counted in ``unparsable``; ``parsed`` is the accuracy among
    the others, zero if there are none.

    Args:
        labels: What the model has to say for each value of the record's label.
        whole: Whether the label has to be the whole answer; otherwise it may stand anywhere in it.
        ignore_case: Whether capitals are small letters.
    """

    labels: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    ignore_case: bool = False

    def answers(self, gold: Any) -> tuple[str, ...]:
        """Return what the model has to say."""
        if str(gold) not in self.labels:
            raise UserError(f"the label {gold!r} is none of {', '.join(map(repr, self.labels))}")
        return (self.labels[str(gold)],)

    def judge(self, text: str, item: LegacyItem) -> Parts:
        """See which labels are named."""
        said = text.lower() if self.ignore_case else text
        named = {label for label in self.labels.values() if (label == said if self.whole else label in said)}
        hit = float(item.gold[0] in named)
        return {"": hit, "unparsable": float(not named), **({"parsed": hit} if named else {})}

    def summary(self, judged: Sequence[Parts]) -> Parts:
        """Return the means."""
        return {"parsed": 0.0, **super().summary(judged)}


@dataclass
class EntityRecall(LegacyTask):
    """CoNLL03: each entity of a sentence is looked for in the answer about its type; the score is recall.

    The mean over types of the share of entities that are found. (RECT calls it F1; there is no precision in it.) The
    file has one word a line, its label last, and a blank line after each sentence; the prompt has ``{type}`` and
    ``{text}``.

    Args:
        types: What each label's ending, ``PER`` in ``B-PER``, is called in the prompt.
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
        """Look for the entity."""
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
