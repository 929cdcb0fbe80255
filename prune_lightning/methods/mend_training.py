r"""Meta-training of MEND's network, in a separate ``Trainer.fit`` before any edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prune_lightning.methods.editor_training import EditorTraining
from prune_lightning.methods.mend_gradients import LabelledRows, TokenGradients, edit_gradients
from prune_lightning.methods.mend_network import MENDNetwork
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.fast_path import agrees
from prune_lightning.models.hooks import add_branch
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import NonNegative
from prune_lightning.text.separators import Pair
from prune_lightning.types import MetaExample

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingOptions:
    r"""Options of meta-training; the defaults are the published ones.

    Args:
        edit_weight: :math:`c_e`.
        learning_rate: Adam's learning rate of the networks.
        rate_learning_rate: Adam's learning rate of the rates :math:`\alpha`.
    """

    edit_weight: NonNegative = 0.1
    learning_rate: NonNegative = 1e-6
    rate_learning_rate: NonNegative = 1e-4


@dataclass(frozen=True)
class MetaLosses:
    """Losses of ``g`` updates, shape ``(g,)``: on rephrased prompts, and on texts that should not change."""

    edit: Tensor
    locality: Tensor


class MENDTraining(EditorTraining):
    r"""Trains the network so that an update changes the edited fact and nothing else.

    .. math:: L = c_e \bigl(-\log p_{W+\Delta W}(y_e \mid x_e')\bigr)
              + \mathrm{KL}\bigl(p_W(\cdot \mid x_{loc}) \,\|\, p_{W+\Delta W}(\cdot \mid x_{loc})\bigr)

    with :math:`x_e'` a rephrased prompt and the divergence averaged over the tokens of the texts. :math:`u` and
    :math:`\delta` are constants to the meta-gradient. No :math:`\Delta W` is formed: every edited matrix gets a branch
    :math:`y \mathrel{+}= (x \tilde U^\top)(\alpha\tilde\Delta)` of rank ``n``, one per independent update of the batch.
    The inputs of the lowest edited block are computed once per step, for the passes before and after the update.

    Args:
        language_model: The model; not trained.
        modules: The modules to edit, by the name of their weight.
        lowest: Index of the lowest edited block.
        network: The network to train.
        options: Options of the training.
    """

    network: MENDNetwork

    def __init__(
        self,
        language_model: LanguageModel,
        modules: Mapping[str, nn.Module],
        lowest: int,
        network: MENDNetwork,
        options: TrainingOptions,
    ) -> None:
        super().__init__(language_model, network)
        self.modules_to_edit, self.lowest, self.options = dict(modules), lowest, options
        self._checked = False  # whether the fast path was compared with the whole model

    # -- one meta-step ----------------------------------------------------------------------------------------------
    def factors(self, examples: Sequence[MetaExample]) -> Factors:
        r"""Return :math:`\tilde U` and :math:`\alpha\tilde\Delta` of every matrix for each example's update.

        Shapes are ``(g, n, in_features)`` and ``(g, n, out_features)``; tokens that do not affect it are zero.
        """
        rows = LabelledRows(self.language_model, [pair for example in examples for pair in example.edits])
        gradients, _ = edit_gradients(self.language_model, self.modules_to_edit, rows, len(examples))
        return {name: self._factors(name, found) for name, found in gradients.items()}

    def _factors(self, name: str, found: TokenGradients) -> tuple[Tensor, Tensor]:
        inputs, deltas = self.network(name, found.inputs[found.kept], found.gradients[found.kept])
        places = found.kept.nonzero(as_tuple=True)
        return (
            inputs.new_zeros(found.inputs.shape).index_put(places, inputs),
            deltas.new_zeros(found.gradients.shape).index_put(places, deltas),
        )

    def losses(self, examples: Sequence[MetaExample], factors: Factors) -> MetaLosses:
        """Return the losses after the updates."""
        pairs = [(*e.rephrased, *((text, None) for text in e.locality)) for e in examples]
        rows = LabelledRows(self.language_model, [pair for group in pairs for pair in group])
        at = torch.cat([rows.row, rows.text_row]), torch.cat([rows.position, rows.text_position])
        before, after = self._passes(rows, *at, factors)
        labels = len(rows.label)
        return MetaLosses(
            rows.nll(after[:labels], len(examples)),
            _divergence(before[labels:], after[labels:], rows.text_row * len(examples) // len(rows.ids), len(examples)),
        )

    def _passes(self, rows: LabelledRows, at_rows: Tensor, at: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return the logits at some positions before and after the updates."""
        model = self.language_model

        @torch.no_grad()
        def upper() -> CachedForward | None:
            start = torch.zeros(len(rows.ids), dtype=torch.long, device=model.device)
            forward = CachedForward(model, self.lowest - 1, rows.ids, rows.mask, start, at_rows, at)
            self._checked = self._checked or agrees(forward.logits_at(forward.hidden, at_rows, at), forward.base_logits)
            return forward if self._checked else None

        forward = model.fast_path.attempt("MEND's training", upper) if self.lowest else None
        if forward is not None:
            before, run = forward.base_logits, partial(forward.logits_at, forward.hidden, at_rows, at)
        else:
            run = partial(model.logits_at, rows.ids, rows.mask, at_rows, at)
            with torch.no_grad():
                before = run()
        with ExitStack() as stack:
            for name, (inputs, deltas) in factors.items():
                stack.enter_context(add_branch(self.modules_to_edit[name], _branch(inputs, deltas)))
            return before, run()

    # -- Lightning ------------------------------------------------------------------------------------------------
    def measured(self, batch: list[MetaExample]) -> dict[str, Tensor]:
        """Return the losses of a batch of independent updates."""
        return self._named(self.losses(batch, self.factors(batch)))

    def scores(self, batch: list[MetaExample]) -> dict[str, Tensor]:
        """Return the losses, and the accuracy of the edited model on the targets."""
        factors = self.factors(batch)
        return {
            **self._named(self.losses(batch, factors)),
            "efficacy": self._share_correct([pair for example in batch for pair in example.edits], factors),
            "generalization": self._share_correct([pair for example in batch for pair in example.rephrased], factors),
        }

    def _share_correct(self, pairs: Sequence[Pair], factors: Factors) -> Tensor:
        """Return the share of pairs whose target's tokens are all the edited model's first choice."""
        rows = LabelledRows(self.language_model, pairs)
        _, logits = self._passes(rows, rows.row, rows.position, factors)
        missed = torch.zeros(len(pairs), device=logits.device)
        missed.index_add_(0, rows.row, (logits.argmax(-1) != rows.label).float())
        return (missed == 0).float().mean()

    def _named(self, losses: MetaLosses) -> dict[str, Tensor]:
        total = (self.options.edit_weight * losses.edit + losses.locality).mean()
        return {"loss": total, "edit": losses.edit.mean(), "locality": losses.locality.mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with a separate parameter group for the rates."""
        options, network = self.options, self.network
        return torch.optim.Adam(
            [
                {"params": list(network.transformations()), "lr": options.learning_rate},
                {"params": [network.rates], "lr": options.rate_learning_rate},
            ]
        )


def _branch(inputs: Tensor, deltas: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Return :math:`x \mapsto (x \tilde U^\top) \tilde\Delta` for rows of ``g`` groups of equal size."""

    def run(x: Tensor) -> Tensor:
        grouped = x.to(inputs).reshape(len(inputs), -1, x.shape[-1])
        change = torch.bmm(torch.bmm(grouped, inputs.transpose(1, 2)), deltas)
        return change.view(*x.shape[:-1], -1).to(x)

    return run


def _divergence(before: Tensor, after: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Return the mean divergence of each group's predictions from what they were, shape ``(groups,)``."""
    precise = torch.promote_types(after.dtype, torch.float32)
    p, q = before.to(precise).log_softmax(-1), after.to(precise).log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    zeros = each.new_zeros(groups)
    return zeros.index_add(0, owner, each) / zeros.index_add(0, owner, torch.ones_like(each)).clamp_min(1)
