r"""Training of SERAC's networks, in a separate ``Trainer.fit`` before any edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.methods.editor_training import EditorTraining
from prune_lightning.methods.mend_gradients import LabelledRows
from prune_lightning.methods.serac_networks import Entry, SERACNetworks, log_scope, prompt_features
from prune_lightning.models.batching import by_length
from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.prompt_memory import Reading
from prune_lightning.models.tokenization import EncodedPair
from prune_lightning.ranges import NonNegative
from prune_lightning.types import MetaExample

LEAST = 1e-6  # of the squared distance of a negative
READ_TOGETHER = 512  # tokens of a pass, so that short prompts are not padded to the length of plain texts
KEPT = 2**15  # prompts whose hidden states are kept, since the language model does not change


@dataclass(frozen=True)
class TrainingOptions:
    r"""Options of the training.

    Args:
        edit_weight: :math:`c_e`.
        learning_rate: Adam's learning rate of the counterfactual model; ``None`` for the published 1e-5 if it begins
            pretrained, and 2e-3 for a new one.
        scope_learning_rate: Adam's learning rate of the classifier.
    """

    edit_weight: NonNegative = 0.1
    learning_rate: NonNegative | None = None
    scope_learning_rate: NonNegative = 5e-4

    def answering_rate(self, pretrained: bool) -> float:
        """Return the learning rate of the counterfactual model."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if pretrained else 2e-3


@dataclass(frozen=True)
class ScopeLosses:
    """Losses of a batch: the counterfactual model's, and the classifier's on prompts inside and outside the scope."""

    answer: Tensor
    inside: Tensor
    outside: Tensor


def read_prompts(model: LanguageModel, layer: int, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return what the classifier reads of prompts, see :func:`.prompt_features`; passes up to the block."""
    cut = [list(row)[-model.tokens.max_length :] for row in rows]
    features: list[Tensor] = [torch.empty(0)] * len(cut)
    for group in by_length([len(row) for row in cut], READ_TOGETHER):
        ids, mask = model.tokens.pad([cut[i] for i in group], model.device)
        with torch.no_grad(), capture(outputs=[model.block(layer)], rows=len(ids)) as seen:
            model(ids, mask)
        found = prompt_features(seen.outputs[0], Reading(mask.bool(), mask.sum(1) - 1))
        for i, row in zip(group, found, strict=True):
            features[i] = row
    return torch.stack(features)


class SERACTraining(EditorTraining):
    r"""Trains both networks with the right edit of every prompt known, as published.

    The edits :math:`z_j = (x_j, y_j)` of a batch are the memory; :math:`x_o` is another prompt of an edit, and
    :math:`x_{loc}` one that it does not concern.

    .. math:: L = c_e \bigl(-\log h(y_o \mid z_{gold}; x_o)\bigr) - \log s(x_o, x_{gold})
              - \log\bigl(1 - s(x_{loc}, x_i)\bigr)

    Each term is a mean over its prompts; a prompt :math:`x_{loc}` is paired with the edit :math:`i` of its example. The
    loss of an answer is a mean over its tokens, the closing separator included. There is no gradient from the answer to
    the classifier.

    Args:
        language_model: The model; not trained.
        layer: The block whose output the classifier reads.
        networks: The networks to train.
        options: Options of the training.
    """

    network: SERACNetworks

    def __init__(
        self, language_model: LanguageModel, layer: int, networks: SERACNetworks, options: TrainingOptions
    ) -> None:
        super().__init__(language_model, networks)
        self.layer, self.options = layer, options
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def embeddings(self, batch: Sequence[MetaExample]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of the edits' prompts, of the other prompts, and of the unrelated ones, in order."""
        tokens = self.language_model.tokens
        groups = [
            [pair.ids[: pair.target_start] for pair in self._encoded(batch, "edits")],
            [pair.ids[: pair.target_start] for pair in self._encoded(batch, "rephrased")],
            tokens.encode_all([text for example in batch for text in example.unrelated]),
        ]
        features = self._features([row for group in groups for row in group])
        edits, others, unrelated = self.network.classifier(features).split([len(group) for group in groups])
        return edits, others, unrelated

    def _features(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return what the classifier reads of prompts, each computed once."""
        found = {key: self._kept[key] for row in rows if (key := tuple(row)) in self._kept}
        if new := [key for key in dict.fromkeys(map(tuple, rows)) if key not in found]:
            found |= zip(new, read_prompts(self.language_model, self.layer, new), strict=True)
        self._kept |= dict(list(found.items())[: max(0, KEPT - len(self._kept))])
        return torch.stack([found[tuple(row)] for row in rows])

    def losses(self, batch: Sequence[MetaExample]) -> ScopeLosses:
        """Return the three losses."""
        edits, others, unrelated = self.embeddings(batch)
        log_s = log_scope(unrelated, edits[self._owners(batch, edits.device)]).clamp_max(-LEAST)
        rows = LabelledRows(self.network.counterfactual.answering, self._asked(batch))
        nll = rows.nll(self._answers(rows), len(rows.ids))
        return ScopeLosses(nll.mean(), -log_scope(others, edits).mean(), -torch.log(-torch.expm1(log_s)).mean())

    def _encoded(self, batch: Sequence[MetaExample], which: str) -> list[EncodedPair]:
        return self.language_model.tokens.encode_pairs([pair for each in batch for pair in getattr(each, which)])

    def _asked(self, batch: Sequence[MetaExample]) -> list[EncodedPair]:
        """Return the other prompts with their answers, each behind its edit."""
        counterfactual = self.network.counterfactual
        entries = [Entry(pair.ids[: pair.target_start], pair.target) for pair in self._encoded(batch, "edits")]
        pairs = self._encoded(batch, "rephrased")
        return [counterfactual.pair(entry, pair) for entry, pair in zip(entries, pairs, strict=True)]

    @staticmethod
    def _owners(batch: Sequence[MetaExample], device: torch.device) -> Tensor:
        """Return the edit that each unrelated prompt is paired with: those of its example, in turn."""
        owners, first = [], 0
        for example in batch:
            owners += [first + i % len(example.edits) for i in range(len(example.unrelated))]
            first += len(example.edits)
        return torch.tensor(owners, device=device)

    def _answers(self, rows: LabelledRows) -> Tensor:
        answering = self.network.counterfactual.answering
        with answering.frozen_mode():
            return answering.logits_at(rows.ids, rows.mask, rows.row, rows.position)

    # -- Lightning ------------------------------------------------------------------------------------------------
    def measured(self, batch: list[MetaExample]) -> dict[str, Tensor]:
        """Return the losses of a batch."""
        losses = self.losses(batch)
        total = self.options.edit_weight * losses.answer + losses.inside + losses.outside
        return {"loss": total, "answer": losses.answer, "inside": losses.inside, "outside": losses.outside}

    def scores(self, batch: list[MetaExample]) -> dict[str, Tensor]:
        """Return the losses, the share of prompts on the right side of a score of one half, and of right answers."""
        edits, others, unrelated = self.embeddings(batch)
        inside = log_scope(others, edits).exp() > 0.5
        outside = log_scope(unrelated, edits[self._owners(batch, edits.device)]).exp() <= 0.5
        rows = LabelledRows(self.network.counterfactual.answering, self._asked(batch))
        missed = torch.zeros(len(rows.ids), device=edits.device)
        missed.index_add_(0, rows.row, (self._answers(rows).argmax(-1) != rows.label).float())
        shares = {"kept_inside": inside, "kept_outside": outside, "answered": missed == 0}
        return {**self.measured(batch), **{name: share.float().mean() for name, share in shares.items()}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with a separate parameter group for the classifier."""
        options, network = self.options, self.network
        return torch.optim.Adam(
            [
                {"params": list(network.counterfactual.parameters()), "lr": options.answering_rate(network.pretrained)},
                {"params": list(network.classifier.parameters()), "lr": options.scope_learning_rate},
            ]
        )
