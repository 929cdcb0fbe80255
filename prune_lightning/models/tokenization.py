"""Tokenisation of prompts with targets, subject positions, and padding.

A target is never tokenised alone. The literal text of prompt and target is tokenised, and the tokens after the prompt's
are the target. This is correct for byte-level, SentencePiece and BOS-adding tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prune_lightning.errors import UserError, shown
from prune_lightning.text.separators import AUTO, Pair, TextPair, as_pair, join


@dataclass(frozen=True)
class EncodedPair:
    """A prompt followed by a target, as token ids.

    Args:
        ids: Prompt and target.
        target_start: Index in ``ids`` of the target's first token.
        dropped: Number of tokens cut off at the beginning because of the model's context length.
        retokenised: Whether the prompt's last tokens change when the target follows. Then the target starts at the
            first token that contains a part of it.
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
    """Converts text into token ids.

    Args:
        tokenizer: A fast tokenizer (its offsets locate the subject).
        max_length: Longest input of the model; longer ones lose their first tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        if not tokenizer.is_fast:
            raise UserError("a fast tokenizer is needed (its offsets locate the subject); convert it with `tokenizers`")
        self.tokenizer = tokenizer
        self.max_length = max_length or 10**9
        probe = tokenizer("a")["input_ids"]  # some tokenizers end every text with an end token
        self._closing = int(len(probe) > 1 and probe[-1] == tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Id used for padding; any id works, since it is masked."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the model's special tokens at its beginning or without any."""
        return self.encode_all([text], special_tokens)[0]

    def encode_all(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Return the ids of several texts, see :meth:`encode`; in one call of the tokenizer, with duplicates only once.

        A text that begins with a start token does not get a second one.
        """
        if not all(text.strip() for text in texts):
            raise UserError("an empty text cannot be encoded")
        unique = list(dict.fromkeys(texts))
        rows: list[list[int]] = self.tokenizer(unique, add_special_tokens=special_tokens)["input_ids"] if unique else []
        if special_tokens:
            rows = [row[self._doubled(row) : len(row) - self._closing] for row in rows]
        ids = dict(zip(unique, rows, strict=True))
        return [ids[text] for text in texts]

    def _doubled(self, row: Sequence[int]) -> int:
        """Return 1 if a text with its own start token got a second one, else 0."""
        start = self.tokenizer.bos_token_id
        return int(start is not None and list(row[:2]) == [start, start])

    def own_start(self, text: str) -> int:
        """Return the length in characters of the start token that a text begins with, 0 if it has none."""
        start = self.tokenizer.bos_token
        return len(start) if start and text.startswith(start) else 0

    def encode_pair(self, prompt: str, target: str, separator: str = AUTO) -> EncodedPair:
        """Encode a prompt with its target.

        Args:
            prompt: Text before the target.
            target: The continuation.
            separator: What stands between them, see :func:`~prune_lightning.text.separators.join`.

        Raises:
            UserError: The prompt or the target is empty, or the target is longer than the model's context.
        """
        return self.encode_pairs([join(prompt, target, separator)])[0]

    def encode_pairs(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Encode several pairs, see :meth:`encode_pair`; literal texts are used unchanged."""
        literal = [as_pair(pair) for pair in pairs]
        contexts = self.encode_all([pair.context for pair in literal])
        wholes = self.encode_all([pair.text for pair in literal])
        return [self._pair(*row) for row in zip(literal, wholes, contexts, strict=True)]

    def _pair(self, pair: TextPair, whole: list[int], context: list[int]) -> EncodedPair:
        start = len(context)
        retokenised = whole[:start] != context
        if retokenised:
            ends = [end for _, end in self._spans(pair.text)[: len(whole)]]
            start = next((i for i, end in enumerate(ends) if end > len(pair.context)), len(whole))
            start = max(start, 1)  # the first token of the text is never predicted
        if start >= len(whole):
            raise UserError(f"the target {shown(pair.continuation)} adds no token to the prompt {shown(pair.context)}")
        excess = max(0, len(whole) - self.max_length)
        if excess >= start:
            raise UserError(
                f"the target {shown(pair.continuation)} is longer than the model's context of {self.max_length} tokens"
            )
        return EncodedPair(whole[excess:], start - excess, excess, retokenised)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return the first character of each token of ``encode(text)``, and the one after its last."""
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        spans: list[tuple[int, int]] = encoding["offset_mapping"]
        return spans[self._doubled(encoding["input_ids"]) :]

    def subject_last(self, text: str, subject_end: int) -> int:
        """Return the index, in ``encode(text)``, of the token that holds the subject's last character.

        Args:
            text: The whole text.
            subject_end: Index of the first character after the subject.
        """
        inside = [i for i, (start, end) in enumerate(self._spans(text)) if start <= subject_end - 1 < end]
        if not inside:
            raise UserError(f"no token of {shown(text)} holds the subject's last character")
        return inside[-1]

    def chat_frame(self) -> tuple[str, str]:
        """Return the chat template's text before a user's turn, and after it up to the answer.

        Raises:
            UserError: There is no template, or it cannot render a single turn.
        """
        if not self.tokenizer.chat_template:
            raise UserError("data.chat_template: the tokenizer has no chat template")
        turn = "PROMPT"
        while turn in str(self.tokenizer.chat_template):
            turn += "X"
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates can raise anything
            raise UserError(f"data.chat_template: the template cannot render a user's turn: {error}") from error
        head, found, tail = str(text).rpartition(turn)
        if not found:
            raise UserError("data.chat_template: the template leaves the user's turn out")
        return head, tail

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
        """Return the text of some ids without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def token_rows(tokens: Tokens, texts: Sequence[str], longest: int, left: int | None = None) -> list[list[int]]:
    """Return texts as token ids, without the empty ones.

    Args:
        tokens: The model's tokens.
        texts: The texts.
        longest: Each is cut after so many tokens.
        left: Stop after so many tokens; ``None`` for all.
    """
    found: list[list[int]] = []
    for text in texts:
        if (left is None or left > 0) and text.strip():
            found.append(tokens.encode(text)[: longest if left is None else min(longest, left)])
            left = None if left is None else left - len(found[-1])
    return found
