"""What may stand beside a model's weights and change its answer to a prompt, and where the prompts of a pass end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prune_lightning.models.key_value_cache import cache_of

Row = tuple[Sequence[int], int]
"""Token ids, and how many of them are the prompt."""

WhichAnswered = Callable[[Sequence[int], Sequence[Sequence[int]]], list[bool]]
"""From the row of each prompt in a pass, and the positions of its tokens in the row: whether it may be answered."""


class PromptMemory:
    """Changes the answers to some prompts, each by itself.

    What it does to a row depends on the row's prompt alone, and is the same for all tokens of the answer. So sequences
    that a memory may answer cannot share the tokens of a common beginning, unless it changes the text alone.

    Attributes:
        only_asks: Whether it only changes what the model is asked, and not what the model computes for it.
    """

    only_asks: ClassVar[bool] = False

    def asked(self, row: Row) -> Row:
        """Return what the model is asked instead of a row; by default the row itself.

        Args:
            row: A prompt, perhaps with an answer behind it, which stays there.
        """
        return row

    @contextmanager
    def watch(self, rows: int, stop: bool = False) -> Iterator[WhichAnswered]:
        """Watch one forward pass of the model without the memory.

        Yield a function that says which prompts of that pass the memory may answer; for all others the pass is already
        right. By default it may answer every prompt.

        Args:
            rows: Rows of the pass.
            stop: Whether to end the pass as soon as that is known.
        """
        yield lambda rows, paths: [True] * len(paths)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Inside the block the model is without the memory."""
        raise NotImplementedError
        yield


@dataclass(frozen=True)
class Reading:
    """The rows of a forward pass.

    Args:
        real: Whether each token is not padding, shape ``(rows, length)``.
        ends: Position of the prompt's last token, shape ``(rows,)``; ``None`` if the pass continues rows whose prompts
            an earlier one has read, as in generation.
    """

    real: Tensor
    ends: Tensor | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.real)

    def at_end(self) -> Tensor:
        """Return where the last token of each prompt is, shape ``(rows, length)``; nowhere in a pass that continues."""
        return torch.zeros_like(self.real) if self.ends is None else self._places() == self.ends[:, None]

    def before_end(self) -> Tensor:
        """Return where the tokens before it are, shape ``(rows, length)``."""
        return torch.zeros_like(self.real) if self.ends is None else self.real & (self._places() < self.ends[:, None])

    def prompt(self) -> Tensor:
        """Return where the tokens of the prompts are, shape ``(rows, length)``."""
        return self.at_end() | self.before_end()

    def _places(self) -> Tensor:
        return torch.arange(self.real.shape[1], device=self.real.device)


class PromptReader:
    """Finds, before every forward pass of a model, where the prompts end.

    The lengths of the prompts are those that are set. Without any, a row is a prompt as a whole: in generation that is
    exact, and a text that is scored as a whole counts as one prompt.

    Attributes:
        lengths: Tokens of each row's prompt, shape ``(rows,)``; ``None`` if the rows are prompts as a whole.
        places: Rows and positions of the logits, if the LM head runs at some places only.
        reading: The rows of the present pass.
    """

    def __init__(self) -> None:
        self.lengths: Tensor | None = None
        self.places: tuple[Tensor, Tensor] | None = None
        self.reading: Reading | None = None

    @contextmanager
    def only_at(self, rows: Tensor, positions: Tensor) -> Iterator[None]:
        """Say that the LM head runs at some places only in the passes inside the block; see :attr:`places`."""
        self.places = rows, positions
        try:
            yield
        finally:
            self.places = None

    def attach(self, model: nn.Module) -> Any:
        """Read every forward pass of a ``transformers`` model; return the handle of the hook."""
        return model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"][..., 0] if tokens is None else tokens
        mask = kwargs.get("attention_mask")
        real = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        if mask is not None:
            if mask.ndim != 2:
                raise ValueError("a model with a memory reads rows with a mask of padding, and each row by itself")
            real = mask[:, -tokens.shape[1] :].bool()
        past = cache_of(kwargs)
        if past is not None and past.get_seq_length() > 0:
            self.reading = Reading(real, None)
            return
        start = real.int().argmax(1)
        lengths = real.sum(1) if self.lengths is None else self.lengths.to(start.device)
        self.reading = Reading(real, start + lengths - 1)
