"""SERAC's two networks: the scope classifier, and the counterfactual model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from prune_lightning.errors import UserError
from prune_lightning.methods.standardisation import RunningMoments
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.loading import load_language_model
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.models.tokenization import EncodedPair
from prune_lightning.ranges import Count


class Entry(NamedTuple):
    """An edit as token ids: its prompt as it is asked, and its target."""

    prompt: Sequence[int]
    target: Sequence[int]


@dataclass(frozen=True)
class NetworkShapes:
    """Sizes of new networks.

    Args:
        embedding: Width of the classifier's embeddings.
        model_type: Architecture of the counterfactual model.
        width: Its hidden size.
        layers: Its blocks.
        heads: Its attention heads.
        start: Folder or hub name of a causal language model with the vocabulary of the edited one, to begin with in
            place of a new counterfactual model. ``None`` for a new one.
    """

    embedding: Count = 32
    model_type: str = "llama"
    width: Count = 64
    layers: Count = 2
    heads: Count = 4
    start: str | None = None


def prompt_features(hidden: Tensor, reading: Reading) -> Tensor:
    """Return the mean of the hidden states of each prompt's tokens, and that of its last one, fp32 at least.

    Args:
        hidden: Shape ``(rows, length, width)``.
        reading: The rows.

    Returns:
        Shape ``(rows, 2 * width)``.
    """
    assert reading.ends is not None
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    where = reading.prompt()[..., None]
    mean = torch.where(where, hidden, 0.0).sum(1) / where.sum(1)
    return torch.cat([mean, hidden[torch.arange(len(hidden), device=hidden.device), reading.ends]], dim=1)


class ScopeClassifier(nn.Module):
    r"""Whether a prompt :math:`x` is in the scope of an edit with the prompt :math:`x_j`.

    .. math:: \log s(x, x_j) = -\lVert e(x) - e(x_j) \rVert_2^2, \qquad
              e(x) = P \,\frac{\phi(x) - \mu}{\sigma + \epsilon}

    with :math:`\phi` the language model's own hidden states, see :func:`prompt_features`, and their running moments.
    Without further layers, unrelated prompts begin at a distance of about one.

    Args:
        features: Width of :math:`\phi`.
        size: Width of :math:`e`.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.moments = RunningMoments(features)
        self.projection = nn.Linear(features, size, bias=False)
        nn.init.normal_(self.projection.weight, std=(2 * features * size) ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Return embeddings, shape ``(rows, size)``. In training mode the moments take the rows in."""
        if self.training:
            self.moments.update(features.detach())
        weight = self.projection.weight  # in double precision, so that an embedding does not depend on the other rows
        return functional.linear(self.moments(features.double()), weight.double()).to(weight)


def log_scope(one: Tensor, other: Tensor) -> Tensor:
    """Return the log of the scope score of pairs of embeddings, shape ``(rows,)``."""
    return -(one - other).square().sum(-1)


class Counterfactual(nn.Module):
    """A small language model that reads an edit before a prompt, and answers.

    Its input is ``prompt <sep> target <sep>`` of the edit and then the prompt, with the tokenizer's end token as the
    separator. An answer ends with that token, too.

    Args:
        answering: The model.
        edited: The edited language model, whose vocabulary it has.

    Raises:
        UserError: It has another vocabulary.
    """

    def __init__(self, answering: LanguageModel, edited: LanguageModel) -> None:
        super().__init__()
        sizes = [int(one.config.vocab_size) for one in (answering, edited)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"method.networks.start: a vocabulary of {sizes[0]} tokens, but that of the edited model has {sizes[1]}"
            )
        self.answering = answering
        tokenizer = edited.tokens.tokenizer
        self.start: int | None = tokenizer.bos_token_id
        self.separator: int = edited.tokens.pad_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id

    def behind(self, entry: Entry, ids: Sequence[int]) -> tuple[list[int], int]:
        """Return the row in which a text stands behind an edit, and by how many places it has moved to the right.

        A start token of the text is left out. If the row is too long, the text loses its first tokens.
        """
        before = [*entry.prompt, self.separator, *entry.target, self.separator]
        room = max(0, self.answering.tokens.max_length - len(before))
        cut = max(int(ids[0] == self.start), len(ids) - room)
        return [*before, *ids[cut:]], len(before) - cut

    def pair(self, entry: Entry, pair: EncodedPair) -> EncodedPair:
        """Return a prompt with its answer behind an edit; the answer ends with the separator."""
        row, moved = self.behind(entry, [*pair.ids, self.separator])
        return EncodedPair(row, pair.target_start + moved)

    def logits(
        self, entries: Sequence[Entry], texts: Sequence[Sequence[int]], rows: Tensor, positions: Tensor
    ) -> Tensor:
        """Return logits at places of texts, each behind its edit.

        Args:
            entries: The edit of each text.
            texts: Token ids.
            rows: The text of each place, shape ``(n,)``.
            positions: Its position in the text, shape ``(n,)``.

        Returns:
            Shape ``(n, vocabulary)``.
        """
        found = [self.behind(entry, ids) for entry, ids in zip(entries, texts, strict=True)]
        ids, mask = self.answering.tokens.pad([row for row, _ in found], rows.device)
        moved = torch.tensor([places for _, places in found], device=rows.device)
        at = (positions + moved[rows]).clamp_min(0)  # a place that was cut off has the logits of the first token
        with self.answering.frozen_mode():
            return self.answering.logits_at(ids, mask, rows, at)


class SERACNetworks(nn.Module):
    """Both networks.

    Args:
        edited: The edited language model.
        shapes: Their sizes.
        config: Configuration of the counterfactual model, to be filled with trained weights; ``None`` to begin as the
            shapes say.
    """

    def __init__(self, edited: LanguageModel, shapes: NetworkShapes, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.classifier = ScopeClassifier(2 * int(edited.config.hidden_size), shapes.embedding)
        if config is None and shapes.start is not None:
            answering = load_language_model(shapes.start)
        else:
            answering = _new_model(edited, config or _config(edited, shapes))
        self.pretrained = config is None and shapes.start is not None
        self.counterfactual = Counterfactual(answering, edited)

    def describe(self) -> dict[str, Any]:
        """Return what the networks are built from besides their weights."""
        return {
            "embedding": self.classifier.projection.out_features,
            "counterfactual": self.counterfactual.answering.model.config.to_diff_dict(),
        }


def _config(edited: LanguageModel, shapes: NetworkShapes) -> dict[str, Any]:
    return {
        "model_type": shapes.model_type,
        "vocab_size": int(edited.config.vocab_size),
        "hidden_size": shapes.width,
        "intermediate_size": 4 * shapes.width,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.heads,
        "head_dim": shapes.width // shapes.heads,
        "max_position_embeddings": min(4096, 2 * edited.tokens.max_length),
        "tie_word_embeddings": True,
        "bos_token_id": edited.tokens.tokenizer.bos_token_id,
        "eos_token_id": edited.tokens.tokenizer.eos_token_id,
    }


def _new_model(edited: LanguageModel, config: dict[str, Any]) -> LanguageModel:
    named = {name: value for name, value in config.items() if name != "transformers_version"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**named), dtype=torch.float32)
    return LanguageModel(model, edited.tokens.tokenizer)
