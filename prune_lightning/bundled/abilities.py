"""Four generated miniature abilities: reasoning, inference, open-domain questions, summarisation.

Each task is a finite set of items that one seeded shuffle splits into test and training, so no test item is in
training. All texts are generated from small grammars.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from prune_lightning.bundled.world import World
from prune_lightning.metrics.functional import constant_score

TEST_ITEMS = 150
SPLIT_SEED = 20250


@dataclass(frozen=True)
class AbilityItem:
    """A prompt and its expected continuation, including the full stop.

    Args:
        prompt: Text without trailing blanks.
        answer: Expected continuation without a leading blank.
    """

    prompt: str
    answer: str

    def text(self) -> str:
        """Return the item as one training document."""
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class AbilityTask:
    """The items of one ability, in a fixed split.

    Args:
        test: Held-out items.
        train: The items that the bundled model was trained on.
        chance: The best score of an answer that does not depend on the prompt.
    """

    test: tuple[AbilityItem, ...]
    train: tuple[AbilityItem, ...]
    chance: float


def _task(test: Sequence[AbilityItem], train: Sequence[AbilityItem], chance: float | None = None) -> AbilityTask:
    constant = constant_score([item.answer for item in test])
    return AbilityTask(tuple(test), tuple(train), constant if chance is None else chance)


def _split(items: list[AbilityItem], test_items: int = TEST_ITEMS, chance: float | None = None) -> AbilityTask:
    shuffled = sorted(set(items), key=lambda item: (item.prompt, item.answer))
    random.Random(SPLIT_SEED).shuffle(shuffled)
    return _task(shuffled[:test_items], shuffled[test_items:], chance)


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_in_words(number: int) -> str:
    """Return 0 to 99 in words.

    >>> number_in_words(42)
    'forty two'
    """
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f" {_ONES[ones]}" if ones else "")


_ADDITION = (
    "{a} plus {b} equals",
    "The sum of {a} and {b} is",
    "Tom had {a} apples and picked {b} more, so now the apples number",
    "A box holds {a} red balls and {b} blue balls, which together makes",
    "After {a} guests had come, {b} more arrived, and the guests were",
)
_SUBTRACTION = (
    "{a} minus {b} equals",
    "Taking {b} away from {a} leaves",
    "Anna had {a} coins and lost {b} of them, so the coins left are",
    "Of {a} birds on a roof {b} flew off, and those that stayed were",
    "A rope of {a} feet was cut by {b} feet, and its length is now",
)


def reasoning() -> AbilityTask:
    """Small sums and differences in words, each pair of numbers in several stories."""
    items = []
    for a, b in itertools.product(range(1, 16), repeat=2):
        for template in _ADDITION:
            prompt = template.format(a=number_in_words(a), b=number_in_words(b))
            items.append(AbilityItem(prompt[0].upper() + prompt[1:], number_in_words(a + b) + "."))
        for template in _SUBTRACTION if a >= b else ():
            prompt = template.format(a=number_in_words(a), b=number_in_words(b))
            items.append(AbilityItem(prompt[0].upper() + prompt[1:], number_in_words(a - b) + "."))
    return _split(items)


_KINDS = {
    "an animal": ("a dog", "a horse", "a rabbit", "a goose"),
    "a fruit": ("an apple", "a pear", "a plum", "a lemon"),
    "a tool": ("a hammer", "a saw", "a shovel", "a drill"),
    "a garment": ("a coat", "a shirt", "a scarf", "a hat"),
}
_PEOPLE = ("Oskar", "Selma", "Viktor", "Nadia", "Ruben", "Ingrid", "Tomas", "Yvonne")
_DEEDS = ("found", "saw", "sold", "drew")
_PLACES = ("garden", "kitchen", "station", "harbour", "forest", "school")


def inference() -> AbilityTask:
    """Entailment: the kind of a thing and its place follow from the premise, other kinds and places do not."""
    items = []
    rng = random.Random(SPLIT_SEED)
    thing_kind = {thing: kind for kind, things in _KINDS.items() for thing in things}
    for person, deed, thing, place in itertools.product(_PEOPLE, _DEEDS, thing_kind, _PLACES):
        premise = f"In the {place} {person} {deed} {thing}."
        other_place = rng.choice([option for option in _PLACES if option != place])
        other_kind = rng.choice([option for option in _KINDS if option != thing_kind[thing]])
        judged = [
            (f"{person} {deed} {thing_kind[thing]}", "true."),
            (f"{person} {deed} {other_kind}", "false."),
            (f"{person} was in the {place}", "true."),
            (f"{person} was in the {other_place}", "false."),
        ]
        for hypothesis, answer in judged:
            items.append(AbilityItem(f"{premise} That {hypothesis} is therefore", answer))
    return _split(items)


def question_answering(world: World) -> AbilityTask:
    """Questions about the world's facts; the test items are about subjects that are never edited.

    All facts are in the training text as statements, but as questions only those of the other subjects.
    """

    def item(question: str, answer: str) -> AbilityItem:
        return AbilityItem(f"Question: {question} Answer:", f"{answer}.")

    tested = [item(fact.question, fact.answer) for fact in world.facts if fact.reserved]
    random.Random(SPLIT_SEED).shuffle(tested)
    train = [item(fact.question, fact.answer) for fact in world.facts if not fact.reserved]
    return _task(tested[:TEST_ITEMS], tested[TEST_ITEMS:] + train)


_AGENTS = [
    "baker",
    "farmer",
    "captain",
    "teacher",
    "merchant",
    "sailor",
    "tailor",
    "miner",
    "painter",
    "doctor",
    "judge",
    "gardener",
    "hunter",
    "butcher",
    "porter",
]
_ACTIONS = {
    "bought": "buys",
    "lost": "loses",
    "repaired": "repairs",
    "stole": "steals",
    "painted": "paints",
    "carried": "carries",
    "burned": "burns",
    "hid": "hides",
}
_THINGS = ["boat", "cart", "lamp", "mirror", "ladder", "basket", "clock", "drum", "bell", "kettle", "carpet", "table"]
_WHEN = ("early in the morning", "after the storm", "before dinner", "on a cold day", "late at night")
_ASIDE = (
    "Nobody in the village noticed.",
    "The neighbours talked about it for weeks.",
    "It had rained since the day before.",
    "A crowd soon gathered in the square.",
    "The children were still asleep.",
)


def summarisation() -> AbilityTask:
    """A passage of three sentences and its headline."""
    rng = random.Random(SPLIT_SEED)
    items = []
    for agent, action, thing in itertools.product(_AGENTS, _ACTIONS, _THINGS):
        first, second = rng.sample(_ASIDE, 2)
        event = f"The {agent} {action} a {thing} {rng.choice(_WHEN)}."
        passage = " ".join((event, first, second) if rng.random() < 0.5 else (first, event, second))
        items.append(AbilityItem(f"{passage} TL;DR:", f"{agent} {_ACTIONS[action]} {thing}."))
    return _split(items, chance=0.07)  # mean ROUGE of the headline of another passage


_ACTORS = ("The old king", "A young girl", "My neighbour", "The traveller", "His brother", "Her aunt", "The queen")
_DID = ("walked to", "looked at", "talked about", "forgot", "dreamed of", "admired", "waited near", "turned from")
_SCENE = ("the river", "a small house", "the green hill", "an old bridge", "the market", "the mountain", "the sea")
_HOW = ("in the morning", "after the storm", "with great care", "for the first time", "without a word", "every day")


def plain_text() -> AbilityTask:
    """Sentences of a small grammar for measuring perplexity (``prompt`` is the first half)."""
    items = []
    rng = random.Random(SPLIT_SEED)
    for actor, did, scene, how in itertools.product(_ACTORS, _DID, _SCENE, _HOW):
        second = f"{rng.choice(_ACTORS).lower()} {rng.choice(_DID)} {rng.choice(_SCENE)}"
        items.append(AbilityItem(f"{actor} {did} {scene} {how}", f"and {second}."))
    return _split(items)


def abilities(world: World) -> dict[str, AbilityTask]:
    """Return the four tasks by the name of their score."""
    return {
        "reasoning": reasoning(),
        "nli": inference(),
        "qa": question_answering(world),
        "summarization": summarisation(),
    }
