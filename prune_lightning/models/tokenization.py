"""The one place where text becomes tokens: prompts with targets, subject positions, padding.

A target is never tokenised alone. ``prompt + " " + target`` is, and what follows the tokens of the prompt is the
target, so byte-level, SentencePiece and BOS-adding tokenizers all come out right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prune_lightning.errors import UserError


@dataclass(frozen=True)
class EncodedPair:
    """A prompt followed by a target, as token ids.

    Args:
        ids: Prompt and target.
        target_start: Index in ``ids`` of the target's first token.
        dropped: Tokens that were cut off at the front because the model's context is shorter.
        retokenised: The prompt's last tokens changed when the target followed; whatever lies behind the common prefix
            counts as target.
    """

    ids: list[int]
    target_start: int
    dropped: int = 0
    retokenised: bool = False

    @property
    def target(self) -> list[int]:
        """The target's token ids."""
        return self.ids[self.target_start :]


class Tokens:
    """Turns text into token ids under one contract.

    Args:
        tokenizer: A fast tokenizer (its offsets locate the subject).
        max_length: Longest input that the model takes; longer ones lose their first tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        if not tokenizer.is_fast:
            raise UserError("a fast tokenizer is needed (its offsets locate the subject); convert it with `tokenizers`")
        self.tokenizer = tokenizer
        self.max_length = max_length or 10**9
        probe = tokenizer("a")["input_ids"]  # some tokenizers close every text with an end token
        self._closing = int(len(probe) > 1 and probe[-1] == tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Id used for padding; masked out, so any id will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that the model expects in front of it, or without any."""
        return self.encode_all([text], special_tokens)[0]

    def encode_all(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Return the ids of several texts, see :meth:`encode`; one call of the tokenizer, equal texts once."""
        if not all(text.strip() for text in texts):
            raise UserError("an empty text cannot be encoded")
        unique = list(dict.fromkeys(texts))
        rows: list[list[int]] = self.tokenizer(unique, add_special_tokens=special_tokens)["input_ids"] if unique else []
        closing = self._closing if special_tokens else 0
        ids = {text: row[: len(row) - closing] for text, row in zip(unique, rows, strict=True)}
        return [ids[text] for text in texts]

    def encode_pair(self, prompt: str, target: str) -> EncodedPair:
        """Encode ``prompt + " " + target``.

        Args:
            prompt: Text before the target; trailing blanks are dropped.
            target: The continuation, without a leading blank.

        Raises:
            UserError: The prompt or the target is empty, or the target is longer than the model's context.
        """
        return self.encode_pairs([(prompt, target)])[0]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """Encode several ``(prompt, target)`` pairs, see :meth:`encode_pair`."""
        prompts = self.encode_all([prompt.rstrip() for prompt, _ in pairs])
        wholes = self.encode_all([f"{prompt.rstrip()} {target.strip()}" for prompt, target in pairs])
        return [self._pair(*row) for row in zip(pairs, wholes, prompts, strict=True)]

    def _pair(self, texts: tuple[str, str], whole: list[int], alone: list[int]) -> EncodedPair:
        prompt, target = texts
        start = len(alone)
        retokenised = whole[:start] != alone
        if retokenised:
            start = next(i for i, (a, b) in enumerate(zip([*whole, -1], [*alone, -2], strict=False)) if a != b)
            start = max(start, 1)  # nothing predicts the very first token
        if start >= len(whole):
            raise UserError(f"the target {target!r} adds no token to the prompt {prompt!r}")
        excess = max(0, len(whole) - self.max_length)
        if excess >= start:
            raise UserError(f"the target {target!r} is longer than the model's context of {self.max_length} tokens")
        return EncodedPair(whole[excess:], start - excess, excess, retokenised)

    def subject_last(self, text: str, subject_end: int) -> int:
        """Return the index, in ``encode(text)``, of the token that holds the subject's last character.

        Args:
            text: The whole text.
            subject_end: Index of the first character after the subject.
        """
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        spans = encoding["offset_mapping"]
        inside = [i for i, (start, end) in enumerate(spans) if start <= subject_end - 1 < end]
        if not inside:
            raise UserError(f"no token of {text!r} holds the subject's last character")
        return inside[-1]

    def pad(self, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Right-pad rows of ids.

        Returns:
            Ids and attention mask, both ``(rows, longest)``.
        """
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids.to(device), mask.to(device)

    def decode(self, ids: list[int] | Tensor) -> str:
        """Return the text of some ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
