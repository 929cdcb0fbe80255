"""Shared by ROME, MEMIT and their variants: context prefixes, keys at the subject, value targets, second moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.distributed import broadcast, map_over_ranks
from prune_lightning.errors import UserError, one_of
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.costs import locating_cost
from prune_lightning.methods.layerwise_keys import LayerwiseKeyReader
from prune_lightning.methods.prompts import key_row, kl_row, target_row
from prune_lightning.methods.value import ValueOptions, Values, optimise_values
from prune_lightning.methods.value_anchor import ANCHORS, mean_norm, rescaled, written_values
from prune_lightning.methods.value_problem import RequestRows, ShiftSite
from prune_lightning.models.contexts import ContextOptions, sample_prefixes
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.second_moment import SecondMoment
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.ranges import Whole
from prune_lightning.types import EditRequest


class LocateThenEdit(EditingModule):
    """Base of the locate-then-edit methods.

    Args:
        language_model: The model to edit.
        layers: Layers whose down-projection is edited.
        second_moments: Where the keys' second moments come from.
        value: Hyper-parameters of the value optimisation.
        contexts: Which prefixes to sample.
        tokens_per_feature: Tokens for the second moments, as a multiple of the keys' width; ``None`` for the corpus.
        kwargs: See :class:`~.base.EditingModule`.

    Attributes:
        one_by_one: Whether each request and each layer has its own value optimisation.
    """

    takes_feedback: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[Whole],
        second_moments: SecondMoments,
        value: ValueOptions | None = None,
        contexts: ContextOptions | None = None,
        tokens_per_feature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, layers, **kwargs)
        self.value = value or ValueOptions()
        one_of("method.value.anchor", self.value.anchor, ANCHORS)
        if self.value.anchor == "own" and self.value.anchor_norm is not None:
            raise UserError("method.value.anchor=own finds the norm of each value by itself: leave out anchor_norm")
        measured = self.value.anchor in ("mean", "cap") and self.value.anchor_norm is None
        if self.value.pilots != ValueOptions.pilots and not measured:
            raise UserError(
                "method.value.pilots is for a norm that is measured: set method.value.anchor=mean or cap, without "
                "anchor_norm"
            )
        self.contexts = contexts or ContextOptions()
        self.second_moments, self.tokens_per_feature = second_moments, tokens_per_feature
        self.prefixes: tuple[str, ...] = ("",)
        self.moments: dict[int, SecondMoment] = {}
        self._anchors: dict[int, float] = {}

    def check(self) -> None:
        """Raise if the second moments cannot be had."""
        self.second_moments.check(self.language_model, self.layers)

    def prepare(self) -> None:
        """Sample the prefixes and compute the second moments on the unedited model."""
        if not self.moments:
            # Every process samples with the same seed, but rounding can differ, so all use those of rank 0.
            self.prefixes = ("", *broadcast(sample_prefixes(self.language_model, self.contexts)))
            self.moments = self.second_moments.compute(
                self.language_model, self.layers, self.clock, self.tokens_per_feature
            )
            if self.value.anchor in ("mean", "cap") or self.value.anchor_norm is not None:
                self._find_anchors()

    def constants(self) -> dict[str, float]:
        """Return the norm of each anchor, by its layer."""
        return {f"anchor_norm/{layer}": norm for layer, norm in self._anchors.items()}

    def load_constants(self, constants: Mapping[str, float]) -> None:
        """Use these anchors. What would be measured now depends on the requests that there are now."""
        self._anchors = {int(name.rpartition("/")[2]): norm for name, norm in constants.items()}

    def summary(self) -> dict[str, Any]:
        """Return the summary with the sampled prefixes and the text of the second moments."""
        found = {"context_prefixes": list(self.prefixes), "second_moments": self.second_moments.summary()}
        return {**super().summary(), **found}

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int],
        second_moments: SecondMoments,
        value: ValueOptions | None = None,
        contexts: ContextOptions | None = None,
        tokens_per_feature: float | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs; see :func:`~.costs.locating_cost`."""
        if tokens_per_feature is not None:
            widest = max(model.edited_shape(layer)[1] for layer in layers)
            second_moments = second_moments.limited(tokens_per_feature, widest)
        return locating_cost(
            model,
            stream,
            layers=layers,
            second_moments=second_moments,
            value=value or ValueOptions(),
            contexts=contexts or ContextOptions(),
            one_by_one=cls.one_by_one,
        )

    def subject_keys(self, requests: Sequence[EditRequest], layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Return the keys at the subject's last token under the present weights, by layer.

        Args:
            requests: ``b`` requests.
            layers: Layers whose keys to return; all edited ones by default.

        Returns:
            Per layer the input of the down-projection, shape ``(b, c, in_features)`` for ``c`` prefixes, fp64.
        """
        walk = self.walk(requests, self.prefixes)
        shape = len(requests), len(self.prefixes), -1
        return {layer: walk.keys(layer).view(shape) for layer in (self.layers if layers is None else layers)}

    def walk(
        self, requests: Sequence[EditRequest], prefixes: Sequence[str], until: int | None = None
    ) -> LayerwiseKeyReader:
        """Return a key reader for the rows of ``requests`` with ``prefixes``; a request's rows are adjacent."""
        model = self.language_model
        return LayerwiseKeyReader(model, [key_row(model, request, p) for request in requests for p in prefixes], until)

    def value_sites(self) -> list[ShiftSite]:
        """Return where values are optimised."""
        return [ShiftSite(layer, "mlp") for layer in self.layers]

    def rows(self, requests: Sequence[EditRequest], prefixes: Sequence[str] | None = None) -> list[RequestRows]:
        """Return the token rows on which the values of the requests are optimised."""
        model, prefixes = self.language_model, self.prefixes if prefixes is None else prefixes
        return [
            RequestRows(tuple(target_row(model, request, prefix) for prefix in prefixes), kl_row(model, request))
            for request in requests
        ]

    def optimise(self, requests: Sequence[EditRequest], site: ShiftSite) -> Values:
        """Optimise the value of each request with a shift at ``site``, and rescale it to its anchor.

        Without an anchor, the ratio to a known norm is reported, and the value stays as it is.
        """
        values, anchor = self._solved(requests, site, self.prefixes), self.value.anchor
        if anchor == "none" and site.layer not in self._anchors:
            return values
        multiplier = 1.0 if site.at == "mlp" else self.language_model.multiplier
        written = written_values(values, self._outputs(requests, site.layer), multiplier)
        if anchor == "own":
            with self.unedited():
                norms = written_values(values, self._outputs(requests, site.layer), multiplier).norm(dim=1)
        else:
            norms = written.new_full((len(requests),), self._anchors[site.layer])
        return rescaled(values, written, norms, anchor, multiplier)

    def _outputs(self, requests: Sequence[EditRequest], layer: int) -> Tensor:
        """Return the present outputs of the edited matrix at the subject, ``(b, width)``."""
        return self.language_model.rewrite_output(layer, self.walk(requests, self.prefixes[:1]).keys(layer))

    def _find_anchors(self) -> None:
        """Set the anchor of each site: the given norm, that of the run that is continued, or a measured one."""
        for site in self.value_sites():
            if self.value.anchor_norm is not None:
                self._anchors[site.layer] = self.value.anchor_norm
            elif site.layer not in self._anchors:
                self._anchors[site.layer] = self._measured_anchor(site)
        self.facts |= self.constants()

    def _measured_anchor(self, site: ShiftSite) -> float:
        """Return the mean norm of the values of the stream's first requests."""
        requests = self.coming_requests(self.value.pilots)
        if not requests:
            raise UserError("method.value.anchor needs requests to measure the norm on: give method.value.anchor_norm")
        multiplier = 1.0 if site.at == "mlp" else self.language_model.multiplier
        values = self._solved(requests, site, self.prefixes[:1])
        return mean_norm(list(written_values(values, self._outputs(requests, site.layer), multiplier)))

    def _solved(self, requests: Sequence[EditRequest], site: ShiftSite, prefixes: Sequence[str]) -> Values:
        """Optimise values as they are. Processes that do not divide the model divide the requests."""

        def work(part: Sequence[EditRequest]) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
            values = optimise_values(self.language_model, self.rows(part, prefixes), site, self.value)
            return list(zip(values.target.cpu(), values.reference.cpu(), values.details, strict=True))

        model = self.language_model
        target, reference, details = zip(*map_over_ranks(requests, work, model.is_sharded), strict=True)
        device = model.device
        return Values(torch.stack(target).to(device), torch.stack(reference).to(device), list(details))
