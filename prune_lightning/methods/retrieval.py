"""How close two texts are, without a network: by their words, or by the model's own hidden states."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from itertools import repeat
from operator import mul
from typing import Any

import torch
from torch import Tensor

from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w+")


def general_sentences() -> list[str]:
    """Return the sentences of the general text that is shipped."""
    text = resources.files("prune_lightning.bundled").joinpath("general.txt").read_text("utf-8")
    return [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()]


class Similarity(ABC):
    """Compares texts; a text is read once and then known by what :meth:`read` returns of it."""

    @abstractmethod
    def read(self, text: str) -> Any:
        """Return what is compared of a text."""

    def read_fact(self, prompt: str, subject: str) -> Any:
        """Return what a text is compared with of a fact; by default its prompt."""
        return self.read(prompt)

    @abstractmethod
    def compare(self, query: Any, texts: Sequence[Any]) -> list[float]:
        """Return the similarity of a text with each of several, between -1 and 1."""


class SharedWords(Similarity):
    r"""The cosine of the sets of words, each weighted by how rare it is in general text.

    The weight of a word is :math:`\log \frac{N + 1}{n + 1}`, with :math:`n` of the :math:`N` sentences of the shipped
    text containing it. So names count, and words such as "the" do not. Words are runs of letters and digits: for
    languages that do not separate words, use :class:`HiddenStates`.
    """

    @cached_property
    def _sentences(self) -> list[set[str]]:
        return [_words(sentence) for sentence in general_sentences()]

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(word for words in self._sentences for word in words)

    def read(self, text: str) -> Mapping[str, float]:
        """Return the weights of a text's words, with a norm of one."""
        total = len(self._sentences) + 1
        weights = {word: math.log(total / (self._counts[word] + 1)) for word in _words(text)}
        norm = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
        return {word: weight / norm for word, weight in sorted(weights.items())}

    def compare(self, query: Mapping[str, float], texts: Sequence[Mapping[str, float]]) -> list[float]:
        """Return the cosine with each text."""
        words, weights = tuple(query), tuple(query.values())
        return [sum(map(mul, weights, map(text.get, words, repeat(0.0)))) for text in texts]


class SubjectWords(SharedWords):
    """The share of a fact's subject that a text contains, each word weighted as in :class:`SharedWords`.

    Questions about other subjects are often worded like the fact's own, and paraphrases are not; but these name the
    subject. Among facts with equal shares, the one with the closest wording is the most similar, by a thousandth.
    """

    def read_fact(self, prompt: str, subject: str) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Return the weights of the prompt's words, and of the subject's."""
        return self.read(prompt), self.read(subject)

    def compare(self, query: Mapping[str, float], texts: Sequence[Any]) -> list[float]:
        """Return the share of each subject, the wording in its third digit."""
        wording = super().compare(query, [prompt for prompt, _ in texts])
        shares = [
            0.0 if query.keys().isdisjoint(subject) else sum(w**2 for word, w in subject.items() if word in query)
            for _, subject in texts
        ]
        return [0.999 * share + 0.001 * close for share, close in zip(shares, wording, strict=True)]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


class HiddenStates(Similarity):
    """The cosine of mean hidden states of the model itself, less their mean over general text.

    The first token is left out of the mean. Attention that has nowhere to go ends there, so that its state is the same
    for all texts and tens of times as long as the others: with it, short texts would be like all other short ones.

    Args:
        model: The language model.
        layer: The block whose output is read.
    """

    def __init__(self, model: LanguageModel, layer: int) -> None:
        self.model, self.layer = model, layer

    @cached_property
    def _center(self) -> Tensor:
        return torch.stack([self._mean(sentence) for sentence in general_sentences()]).mean(0)

    @torch.no_grad()
    def _mean(self, text: str) -> Tensor:
        """Return the mean over a text's later tokens, fp32 at least; a row by itself, so that nothing else matters."""
        ids, mask = self.model.tokens.pad(
            [self.model.tokens.encode(text)[-self.model.tokens.max_length :]], self.device
        )
        with self.model.frozen_mode(), capture(outputs=[self.model.block(self.layer)], rows=1) as seen:
            self.model(ids, mask)
        hidden = seen.outputs[0][0]
        hidden = hidden[1:] if len(hidden) > 1 else hidden
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).mean(0)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def read(self, text: str) -> Tensor:
        """Return the centred mean, with a norm of one."""
        return torch.nn.functional.normalize(self._mean(text) - self._center.to(self.device), dim=0)

    def compare(self, query: Tensor, texts: Sequence[Tensor]) -> list[float]:
        """Return the cosine with each text."""
        return [float(query @ text.to(query)) for text in texts]
