"""IKE: facts and demonstrations in the context, and no change of the model (Zheng et al., EMNLP 2023)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.errors import UserError, one_of
from prune_lightning.methods.retrieval import HiddenStates, SharedWords, Similarity, SubjectWords
from prune_lightning.methods.side_memory import MemoryEditor, SideMemory
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Row
from prune_lightning.ranges import Count, Whole
from prune_lightning.requests import PLAIN
from prune_lightning.types import EditRequest, MemoryUpdate
from prune_lightning.value_types import check_values

SIMILARITIES = ("subject", "words", "hidden")
_KEPT = 2**14  # prompts
Demonstration = Sequence[str]
"""A new fact, a prompt, and its answer."""


class Fact(NamedTuple):
    """A fact as text.

    Args:
        prompt: Its prompt.
        whole: The prompt with the answer.
        subject: Its subject.
        head: The chat template before a prompt.
        tail: The one behind it.
    """

    prompt: str
    whole: str
    subject: str
    head: str = ""
    tail: str = ""


class FactMemory(SideMemory):
    """Facts as text. A prompt that is close enough to some is asked after them.

    Args:
        language_model: The model.
        similarity: Compares a prompt with facts.
        threshold: Least similarity with a fact.
        facts: Largest number of facts before a prompt.
        demonstrations: Where demonstrations are chosen from.
        count: Number of demonstrations before the facts.
    """

    only_asks: ClassVar[bool] = True

    def __init__(
        self,
        language_model: LanguageModel,
        similarity: Similarity,
        threshold: float,
        facts: int,
        demonstrations: Sequence[Demonstration],
        count: int,
    ) -> None:
        self.similarity, self.threshold, self.facts, self.count = similarity, threshold, facts, count
        self.demonstrations = [tuple(each) for each in demonstrations]
        self._wording = SharedWords()
        self._behind = lru_cache(_KEPT)(self._behind_facts)  # an evaluation asks every prompt many times
        super().__init__("facts", language_model)

    @cached_property
    def _shown(self) -> list[Mapping[str, float]]:
        """What demonstrations are compared by: the words of the fact and of the prompt."""
        return [self._wording.read(f"{fact} {asked}") for fact, asked, _ in self.demonstrations]

    # -- the state ------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Forget all facts."""
        self.texts: list[Fact] = []
        self._read: list[Any] = []
        self._behind.cache_clear()

    def include(self, tensors: Mapping[str, Tensor]) -> None:
        """Add facts; a prompt that is known gets the later answer."""
        self._behind.cache_clear()
        for fact in unpacked(tensors):
            known = next((i for i, other in enumerate(self.texts) if other.prompt == fact.prompt), None)
            if known is not None:
                del self.texts[known], self._read[known : known + 1]
            self.texts.append(fact)

    def contents(self) -> dict[str, Tensor]:
        """Return the texts as bytes."""
        return packed(self.texts, self.device)

    def load(self, contents: Mapping[str, Tensor]) -> None:
        """Replace the texts."""
        self.clear()
        self.texts = unpacked(contents)

    def __len__(self) -> int:
        return len(self.texts)

    # -- a prompt -------------------------------------------------------------------------------------------------
    def retrieved(self, prompt: str) -> list[tuple[str, float]]:
        """Return the facts close to a prompt, each with its similarity, the closest last."""
        self._read += [self.similarity.read_fact(fact.prompt, fact.subject) for fact in self.texts[len(self._read) :]]
        found = self.similarity.compare(self.similarity.read(prompt), self._read)
        close = sorted((similarity, i) for i, similarity in enumerate(found) if similarity >= self.threshold)
        return [(self.texts[i].whole, similarity) for similarity, i in close[-self.facts :]]

    def contexts(self, prompt: str) -> Iterator[str]:
        """Yield the text before a prompt, with ever fewer demonstrations; nothing if no fact is close."""
        facts = [fact for fact, _ in self.retrieved(prompt)]
        if not facts:
            return
        scores = self._wording.compare(self._wording.read(f"{facts[-1]} {prompt}"), self._shown)
        order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
        asked = "\n".join(f"New Fact: {fact}" for fact in facts) + "\nPrompt: "
        for count in range(min(self.count, len(order)), -1, -1):
            yield "\n\n".join([*(shown_as(*self.demonstrations[i]) for i in order[len(order) - count :]), asked])

    def asked(self, row: Row) -> Row:
        """Return the row behind its facts and as many demonstrations as fit the model's context.

        It stays as it is if no fact is close, or if not even the facts fit.
        """
        ids, length = row
        longer, answer = self._behind(tuple(ids[:length]), len(ids) - length), ids[length:]
        return ([*longer, *answer], len(longer)) if longer else row

    def _behind_facts(self, ids: tuple[int, ...], room: int) -> Sequence[int]:
        """Return a prompt behind its facts, so that ``room`` more tokens fit; nothing if it is asked as it is."""
        tokens = self.language_model.tokens
        text = str(tokens.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        text = text[tokens.own_start(text) :]
        head, prompt, tail = self._unframed(text)
        # Some are not what their text gives, such as a prompt that was cut.
        is_text = bool(text.strip()) and tokens.encode(text) == list(ids)
        for context in self.contexts(prompt) if prompt.strip() else ():
            longer = tokens.encode(head + context + prompt + tail) if is_text else [*tokens.encode(context), *ids]
            if len(longer) + room <= tokens.max_length:
                return array("l", longer)
        return ()

    def _unframed(self, text: str) -> tuple[str, str, str]:
        """Return the chat template before a prompt, the prompt, and the template behind it."""
        for head, tail in dict.fromkeys((fact.head, fact.tail) for fact in self.texts):
            if text.startswith(head) and text.endswith(tail):
                return head, text[len(head) : len(text) - len(tail)], tail
        return "", text, ""


def shown_as(fact: str, prompt: str, answer: str) -> str:
    """Return a demonstration as text."""
    return f"New Fact: {fact}\nPrompt: {prompt} {answer}"


def packed(facts: Sequence[Fact], device: torch.device) -> dict[str, Tensor]:
    """Return facts as tensors: the bytes of their texts, and how many belong to each."""
    pieces = [text.encode() for fact in facts for text in fact]
    held = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8) if pieces else torch.empty(0).byte()
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.long).view(-1, len(Fact._fields))
    return {"bytes": held.to(device), "lengths": lengths.to(device)}


def unpacked(tensors: Mapping[str, Tensor]) -> list[Fact]:
    """Return the facts of :func:`packed`."""
    content, place, facts = bytes(tensors["bytes"].cpu().tolist()), 0, []
    for sizes in tensors["lengths"].tolist():
        texts = []
        for size in sizes:
            texts.append(content[place : place + size].decode())
            place += size
        facts.append(Fact(*texts))
    return facts


class IKE(MemoryEditor):
    """Put facts that are close to a prompt before it, behind demonstrations of how to use them.

    A prompt is asked as ``New Fact: {fact}`` and ``Prompt: {prompt}``, after demonstrations of the same form: of a fact
    that is asked for as it stands, of one that is asked for in other words, and of one that the prompt does not
    concern. Without demonstrations it is ICE. The published editor puts the fact before every prompt, so that its
    locality is never tested in a stream; here only facts above a threshold are retrieved, and a prompt without any is
    asked as it is.

    Args:
        language_model: The model.
        layers: The block whose output is read for ``similarity=hidden``, one only.
        similarity: ``subject``: see :class:`~.retrieval.SubjectWords`; ``words``: see :class:`~.retrieval.SharedWords`;
            ``hidden``: see :class:`~.retrieval.HiddenStates`.
        threshold: Least similarity of a prompt with a fact.
        facts: Largest number of facts before a prompt.
        demonstrations: A list of a new fact, a prompt and its answer each.
        count: Number of demonstrations, those whose words are closest to fact and prompt.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: An unknown similarity, more than one layer for it, or a demonstration that has not three texts.
    """

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole] | None = None,
        similarity: str = "subject",
        threshold: float = 0.6,
        facts: Count = 1,
        demonstrations: Sequence[Sequence[str]] = (),
        count: Whole = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers or (), **kwargs)
        one_of("method.similarity", similarity, SIMILARITIES)
        check_values("method", Count, facts=facts)
        check_values("method", Whole, count=count)
        if similarity == "hidden" and len(self.layers) != 1:
            raise UserError(f"method.similarity=hidden reads one block, but method.layers is {list(self.layers)}")
        if any(len(each) != 3 for each in demonstrations):
            raise UserError("method.demonstrations: each has a new fact, a prompt, and its answer")
        self.similarity, self.threshold, self.facts_shown = similarity, threshold, facts
        self.demonstrations, self.count = demonstrations, count

    @classmethod
    def cost(cls, model: Shapes, stream: StreamShape, **options: Any) -> Cost:
        """Return the costs: the text of the facts. Longer prompts cost time when they are asked, not here."""
        text = 8.0 * (stream.prompt + stream.target)  # bytes, with the prompt a second time
        held = {"facts": text * stream.edits}
        return Cost([], rank=0.0, memory=held, disk=held)

    def new_memory(self) -> FactMemory:
        """Return a memory without facts."""
        model = self.language_model
        similarity: Similarity = SubjectWords() if self.similarity == "subject" else SharedWords()
        if self.similarity == "hidden":
            similarity = HiddenStates(model, self.layers[0])
        shown = self.demonstrations, self.count
        return FactMemory(model, similarity, self.threshold, self.facts_shown, *shown)

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, MemoryUpdate], list[dict[str, Any]]]:
        """Return the text of the facts."""
        facts = []
        for request in requests:
            pair = replace(request, frame=PLAIN).pair()
            facts.append(Fact(pair.context, pair.text, request.subject, *request.frame))
        return {self.side.name: MemoryUpdate(packed(facts, self.device))}, [{"fact": fact.whole} for fact in facts]
