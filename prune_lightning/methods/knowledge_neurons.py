"""KN: knowledge neurons (Dai et al., ACL 2022, https://arxiv.org/abs/2104.08696), for decoder models."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.distributed import map_over_ranks
from prune_lightning.errors import UserError
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.neuron_attribution import (
    answer_tokens,
    greedy_tokens,
    integrated_gradients,
)
from prune_lightning.methods.patched_neurons import AttributionOptions
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, ShareBelowOne, Whole
from prune_lightning.types import EditRequest, LowRankUpdate

Neuron = tuple[int, int]  # layer, index
_STEP = 0.05  # by which the share of prompts is adjusted


@dataclass(frozen=True)
class SelectionOptions:
    """How the knowledge neurons of a fact are selected.

    Args:
        threshold: The coarse set of a prompt consists of the neurons whose attribution is above this share of the
            largest one over all layers.
        refine: Keep only neurons that the coarse sets of prompt and paraphrases share. These are the same paraphrases
            on which generalization is scored.
        share: A neuron is kept if it is in the coarse sets of more than this share of the prompts.
        wanted: Smallest and largest number of neurons; ``share`` is lowered or raised in steps of 0.05 until the number
            is in this range, but never to an empty set. ``None`` keeps ``share`` fixed.
    """

    threshold: ShareBelowOne = 0.2
    refine: bool = False
    share: ShareBelowOne = 0.7
    wanted: tuple[Count, Count] | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"selection: `{name}` is expected to be in [0, 1), but got {getattr(self, name)}")
        if self.wanted is not None and not (len(self.wanted) == 2 and 1 <= self.wanted[0] <= self.wanted[1]):
            raise UserError(f"selection: `wanted` is expected to be [fewest, most], but got {list(self.wanted)}")
        if not self.refine and (self.wanted is not None or self.share != type(self).share):
            raise UserError("selection: `share` and `wanted` choose among several prompts' neurons: set `refine=true`")


def coarse_set(attributions: Mapping[int, Tensor], threshold: float) -> set[Neuron]:
    """Return the neurons above ``threshold`` times the largest attribution over all layers.

    Args:
        attributions: Per layer one prompt's attributions, shape ``(neurons,)``.
        threshold: Share of the largest attribution.
    """
    limit = threshold * largest(attributions)
    return {
        (layer, int(index))
        for layer, values in attributions.items()
        for index in torch.nonzero(values > limit)[:, 0].tolist()
    }


def largest(attributions: Mapping[int, Tensor]) -> float:
    """Return the largest attribution over all layers; NaN if any is NaN."""
    return float(torch.stack([values.max() for values in attributions.values()]).max())


def refined_set(coarse: Sequence[set[Neuron]], options: SelectionOptions) -> set[Neuron]:
    """Return the neurons that enough of the coarse sets share.

    Args:
        coarse: One set per prompt.
        options: Share of the prompts, and whether to adjust it.
    """
    counts = Counter(neuron for found in coarse for neuron in found)

    def shared(share: float) -> set[Neuron]:
        return {neuron for neuron, count in counts.items() if count > share * len(coarse)}

    share, found = options.share, shared(options.share)
    if options.wanted is None:
        return found
    fewest, most = options.wanted
    while len(found) < fewest and share > 0:
        share = max(0.0, round(share - _STEP, 6))
        found = shared(share)
    while len(found) > most and (fewer := shared(share := round(share + _STEP, 6))):
        found = fewer
    return found


class KnowledgeNeurons(EditingModule):
    r"""Write the new answer into the value slots of the neurons that express the old one.

    The neurons are found by integrated gradients (:func:`~.neuron_attribution.integrated_gradients`) of the old
    answer's probability, a mean over its tokens, then filtered. Their columns of the down-projection become

    .. math:: w_n \leftarrow w_n - \lambda_1 \sum_j e(\hat y_j) + \lambda_2 \sum_j e(y^*_j)

    with :math:`e` the input embedding, :math:`y^*` the new answer and :math:`\hat y` as many tokens of the model's own
    answer (Dai et al. 2022, section 5.1, and the public code for decoders). All columns of a layer change by the same
    vector, so the update has rank one per request and layer; layers without such a neuron keep every bit. The requests
    of a batch are attributed on the model before it.

    Args:
        language_model: The model to edit.
        layers: Layers whose neurons are attributed; all by default.
        attribution: How neurons are attributed.
        selection: Which of them are edited.
        old_weight: :math:`\lambda_1`; the paper has 1.
        new_weight: :math:`\lambda_2`; the paper has 8.
        single_token_factor: Both weights are multiplied by this where the new answer is one token; the public code
            has 2, the paper (whose answers are single tokens) 1.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: The embeddings are not as wide as the down-projection's output, or the model's family does not say
            where the pre-activations are.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: Sequence[Whole] | None = None,
        attribution: AttributionOptions | None = None,
        selection: SelectionOptions | None = None,
        old_weight: float = 1.0,
        new_weight: float = 1.0,
        single_token_factor: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, range(language_model.num_layers) if layers is None else layers, **kwargs)
        self.attribution = attribution or AttributionOptions()
        self.selection = selection or SelectionOptions()
        self.old_weight, self.new_weight = old_weight, new_weight
        self.single_token_factor = single_token_factor
        self.attribution.module(language_model, self.layers[0])
        column = language_model.rewrite_module(layer := self.layers[0]).weight.numel() // language_model.key_size(layer)
        if (width := self._embeddings().shape[1]) != column:
            raise UserError(f"KN writes embeddings, here {width} wide, into columns, here {column} long")

    @classmethod
    def unusable(cls, request: EditRequest) -> str | None:
        """Refuse a request without an old answer."""
        if request.target_old is None:
            return "KN edits the neurons of the old answer; give the record `target_old`"
        return None

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int] | None = None,
        attribution: AttributionOptions | None = None,
        **options: Any,
    ) -> Cost:
        """Return the costs of the attribution, prompt by prompt without paraphrases.

        Each token of the old answer needs one pass over the prompt and, for each layer and each point, a forward and
        backward pass of a single token through the blocks above. The mean over layers is that of the lowest and the
        highest one.
        """
        wanted = list(range(model.num_layers)) if layers is None else list(layers)
        points, tokens = (attribution or AttributionOptions()).steps, max(1, round(stream.target))
        ends = [model.step(layer, points, 1, points) for layer in (wanted[0], wanted[-1])]
        attributed = (ends[0] + ends[1]) * (len(wanted) / 2)
        length = round(stream.prompt + stream.target - 1)
        return Cost(
            [model.edited_shape(layer) for layer in wanted],
            peaks={"attribution": ends[0].saved * (attribution or AttributionOptions()).layers_together},
            per_edit={"attribution": (model.forward(1, length, 1) + attributed) * tokens},
            length=length,
        )

    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return one rank-one update per request and layer with a selected neuron, concatenated."""
        for request in requests:
            if reason := self.unusable(request):
                raise UserError(f"case {request.case_id}: {reason}")
        found = map_over_ranks(requests, lambda part: [(self._change(each).cpu(), self._locate(each)) for each in part])
        updates: dict[int, list[LowRankUpdate]] = {}
        for change, detail in found:
            left = change[:, None].to(self.language_model.device)
            for layer in sorted({layer for layer, _ in detail["neurons"]}):
                right = left.new_zeros(self.language_model.key_size(layer), 1)
                right[[index for at, index in detail["neurons"] if at == layer]] = 1
                updates.setdefault(layer, []).append(LowRankUpdate(left, right))
        name = self.language_model.rewrite_name
        return {name(layer): LowRankUpdate.sum(updates[layer]) for layer in sorted(updates)}, [d for _, d in found]

    def _locate(self, request: EditRequest) -> dict[str, Any]:
        """Return the knowledge neurons of a fact and the details to report."""
        start = time.perf_counter()
        assert request.target_old is not None
        old = request.target_old
        pairs = [request.pair(old), *(request.paraphrase_pairs(old) if self.selection.refine else ())]
        answers = answer_tokens(self.language_model, pairs)
        questions = [question for answer in answers for question in answer]
        found = integrated_gradients(self.language_model, self.layers, questions, self.attribution)
        lengths = [len(answer) for answer in answers]
        parts = {layer: [part.mean(0) for part in values.split(lengths)] for layer, values in found.items()}
        per_prompt = [{layer: parts[layer][i] for layer in self.layers} for i in range(len(pairs))]
        coarse = [coarse_set(attributions, self.selection.threshold) for attributions in per_prompt]
        return {
            "neurons": sorted(refined_set(coarse, self.selection) if self.selection.refine else coarse[0]),
            "coarse_neurons": [len(neurons) for neurons in coarse],
            "attribution_max": largest(per_prompt[0]),
            "attribution_seconds": time.perf_counter() - start,
        }

    @torch.no_grad()
    def _change(self, request: EditRequest) -> Tensor:
        """Return the change of each neuron's column, shape ``(out_features,)``, fp64."""
        (pair,) = self.language_model.tokens.encode_pairs([request.pair()])
        (generated,) = greedy_tokens(self.language_model, [pair.ids[: pair.target_start]], [len(pair.target)])
        factor = self.single_token_factor if len(pair.target) == 1 else 1.0
        old, new = (self._embeddings()[tokens].double().sum(0) for tokens in (generated, pair.target))
        return factor * (self.new_weight * new - self.old_weight * old)

    def _embeddings(self) -> Tensor:
        weight: Tensor = self.language_model.model.get_input_embeddings().weight
        return weight.detach()
