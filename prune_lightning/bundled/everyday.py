"""A small benchmark of multiple choice for real language models: five tasks, written for this project.

The items are made from the tables in `everyday/`. No item mentions a subject of the bundled world.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

_WRONG = 3


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt and its possible continuations, one of them right.

    Args:
        prompt: Text without trailing blanks.
        choices: Continuations without a leading blank.
        right: Index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int

    def text(self) -> str:
        """Return the prompt with the right continuation."""
        return f"{self.prompt} {self.choices[self.right]}"


def everyday() -> dict[str, list[ChoiceItem]]:
    """Return the items of each task, by the name of its score."""
    return {
        "knowledge": [item for table in _tables("knowledge") for item in _matching(table)],
        "sums": _sums(),
        "relations": [item for table in _tables("relations") for item in _matching(table)],
        "grammar": [item for table in _tables("grammar") for item in _grammatical(table)],
        "reading": [item for table in _tables("reading") for item in _passages(table)],
    }


def _tables(name: str) -> list[dict[str, Any]]:
    source = resources.files(__package__).joinpath("everyday", f"{name}.yaml").read_text("utf-8")
    tables: list[dict[str, Any]] = yaml.safe_load(source)
    return tables


def _item(number: int, prompt: str, right: str, wrong: Sequence[str]) -> ChoiceItem:
    """Return an item whose right answer stands at each place in turn."""
    place = number % (len(wrong) + 1)
    return ChoiceItem(prompt[0].upper() + prompt[1:], (*wrong[:place], right, *wrong[place:]), place)


def _matching(table: Mapping[str, Any]) -> Iterator[ChoiceItem]:
    """Yield an item per row. Its wrong answers are the right ones of the next rows."""
    rows, wordings = list(table["rows"].items()), table["wordings"]
    for number, (given, right) in enumerate(rows):
        wrong = [rows[(number + step) % len(rows)][1] for step in range(1, _WRONG + 1)]
        yield _item(number, wordings[number % len(wordings)].format(given), right, wrong)


def _grammatical(table: Mapping[str, Any]) -> Iterator[ChoiceItem]:
    endings = table["endings"]
    for right, beginnings in enumerate(table["beginnings"]):
        for number, beginning in enumerate(beginnings):
            pair = endings[number % len(endings)]
            yield _item(number + right, beginning, pair[right], [pair[1 - right]])


def _passages(table: Mapping[str, Any]) -> Iterator[ChoiceItem]:
    """Yield an item per passage and question. Its wrong answers are those of the next passages."""
    rows = table["rows"]
    for number, row in enumerate(rows):
        for ask, column in table["asks"].items():
            wrong = [rows[(number + step) % len(rows)][column] for step in range(1, _WRONG + 1)]
            prompt = f"{table['passage']} {ask}".format(*row)
            yield _item(number + column, prompt, row[column], wrong)


_PLUS = (
    "{a} birds sit in a tree and {b} more come. Now there are {a} + {b} =",
    "Tom has {a} apples and gets {b} more. Now he has {a} + {b} =",
    "A box holds {a} red balls and {b} blue balls. Together that makes {a} + {b} =",
    "The bus has {a} passengers. Then {b} people get on, which makes {a} + {b} =",
)
_MINUS = (
    "{a} birds sit in a tree and {b} fly away. Now there are {a} - {b} =",
    "Tom has {a} apples and eats {b} of them. Now he has {a} - {b} =",
    "A box holds {a} balls and {b} are taken out. That leaves {a} - {b} =",
    "The bus has {a} passengers. Then {b} people get off, which leaves {a} - {b} =",
)


def _sums() -> list[ChoiceItem]:
    """Return sums and differences. The right answer is at each rank among four neighbouring numbers equally often."""
    items: list[ChoiceItem] = []
    for signs, sign in ((_PLUS, 1), (_MINUS, -1)):
        pairs = [(a, b) for a in range(3, 14) for b in range(2, 10) if _WRONG <= a + sign * b <= 20 - _WRONG]
        for number, (a, b) in enumerate(pairs):
            wording, result = signs[number % len(signs)], a + sign * b
            lowest = result - (number // len(signs)) % (_WRONG + 1)
            near = [n for n in range(lowest, lowest + _WRONG + 1) if n != result]
            items.append(_item(number, wording.format(a=a, b=b), str(result), [str(n) for n in near]))
    return items
