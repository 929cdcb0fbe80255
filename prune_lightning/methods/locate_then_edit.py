"""What ROME, MEMIT and their kin share: context prefixes, keys at the subject, value targets, second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.prompts import key_row, kl_row, target_row
from prune_lightning.methods.value import ValueOptions, Values, optimise_values
from prune_lightning.methods.value_problem import RequestRows, ShiftSite
from prune_lightning.models.contexts import ContextOptions, sample_prefixes
from prune_lightning.models.hooks import record
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoment, SecondMoments
from prune_lightning.types import EditRequest


@dataclass(frozen=True)
class SubjectStates:
    """Activations at the subject's last token, for ``b`` requests under ``c`` prefixes.

    Args:
        keys: Per layer the input of the down-projection, shape ``(b, c, in_features)``.
        hidden: Output of the last layer's block, shape ``(b, c, width)``.
    """

    keys: dict[int, Tensor]
    hidden: Tensor


class LocateThenEdit(EditingModule):
    """Base of the locate-and-edit methods.

    Args:
        language_model: The model to edit.
        layers: Layers whose down-projection is edited.
        second_moments: Where the keys' second moments come from.
        value: Hyper-parameters of the value optimisation.
        contexts: Which prefixes to sample.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[int],
        second_moments: SecondMoments,
        value: ValueOptions | None = None,
        contexts: ContextOptions | None = None,
    ) -> None:
        super().__init__(language_model, layers)
        self.value = value or ValueOptions()
        self.contexts = contexts or ContextOptions()
        self.second_moments = second_moments
        self.prefixes: tuple[str, ...] = ("",)
        self.moments: dict[int, SecondMoment] = {}

    def prepare(self) -> None:
        """Sample the prefixes and take the second moments on the unedited model."""
        if not self.moments:
            self.prefixes = ("", *sample_prefixes(self.language_model, self.contexts))
            self.moments = self.second_moments.compute(self.language_model, self.layers, self.track)

    @torch.no_grad()
    def subject_states(
        self, requests: Sequence[EditRequest], prefixes: Sequence[str], layers: Sequence[int] | None = None
    ) -> SubjectStates:
        """Read keys and hidden states at the subject in one forward pass that stops above the last layer.

        Args:
            requests: ``b`` requests.
            prefixes: ``c`` context prefixes.
            layers: Layers whose keys are wanted; all edited ones by default.
        """
        model, layers = self.language_model, self.layers if layers is None else layers
        rows = [key_row(model, request, prefix) for request in requests for prefix in prefixes]
        modules: list[nn.Module] = [model.rewrite_module(layer) for layer in layers]
        ids, mask = model.tokens.pad([row.ids for row in rows], model.device)
        with record(inputs=modules, outputs=[model.block(self.layers[-1])]) as seen:
            model(ids, mask)
        at = torch.arange(len(rows), device=model.device)
        subject = torch.tensor([row.subject for row in rows], device=model.device)

        def pick(activation: Tensor) -> Tensor:
            chosen = activation[at, subject].double()
            return chosen.view(len(requests), len(prefixes), -1)

        return SubjectStates(
            {layer: pick(seen.inputs[i]) for i, layer in enumerate(layers)},
            pick(seen.outputs[0]),
        )

    def optimise(self, requests: Sequence[EditRequest], site: ShiftSite) -> Values:
        """Optimise the value of each request with the shift entering at ``site``."""
        model = self.language_model
        rows = [
            RequestRows(tuple(target_row(model, request, prefix) for prefix in self.prefixes), kl_row(model, request))
            for request in requests
        ]
        return optimise_values(model, rows, site, self.value)
