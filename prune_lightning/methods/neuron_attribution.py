"""Attributes an answer to MLP neurons by integrated gradients at the last position of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.methods.patched_neurons import AttributionOptions, PatchedNeurons, UpperPatched, WholePatched
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.fast_path import agrees
from prune_lightning.models.hooks import Recorder, capture
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.text.separators import Pair


@dataclass(frozen=True)
class NextToken:
    """What is attributed to neurons: the probability of ``token`` after ``ids``."""

    ids: list[int]
    token: int


@torch.no_grad()
def greedy_tokens(model: LanguageModel, rows: Sequence[list[int]], counts: Sequence[int]) -> list[list[int]]:
    """Continue each of ``rows`` greedily by ``counts[i]`` tokens.

    Args:
        model: The language model.
        rows: Token ids.
        counts: Number of new tokens for each row.
    """
    texts = [list(row) for row in rows]
    while short := [i for i, row in enumerate(rows) if len(texts[i]) < len(row) + counts[i]]:
        ids, mask = model.tokens.pad([texts[i] for i in short], model.device)
        logits = model.logits_at(ids, mask, torch.arange(len(short), device=model.device), mask.sum(1) - 1)
        for i, token in zip(short, logits.argmax(-1).tolist(), strict=True):
            texts[i].append(token)
    return [text[len(row) :] for text, row in zip(texts, rows, strict=True)]


def answer_tokens(model: LanguageModel, pairs: Sequence[Pair]) -> list[list[NextToken]]:
    """Return the tokens of each answer as questions.

    The i-th question is for the answer's i-th token after the prompt and the model's own first i greedy tokens, as
    published. The preceding tokens are the model's, not the answer's.

    Args:
        model: The language model.
        pairs: Prompts with their answers.
    """
    encoded = model.tokens.encode_pairs(pairs)
    before = [pair.ids[: pair.target_start] for pair in encoded]
    generated = greedy_tokens(model, before, [len(pair.target) - 1 for pair in encoded])
    return [
        [NextToken(ids + own[:i], token) for i, token in enumerate(pair.target)]
        for pair, ids, own in zip(encoded, before, generated, strict=True)
    ]


def integrated_gradients(
    model: LanguageModel, layers: Sequence[int], questions: Sequence[NextToken], options: AttributionOptions
) -> dict[int, Tensor]:
    r"""Attribute the probability of a token to the neurons of each layer at the last position.

    .. math:: \mathrm{IG}(a_\ell) = a_\ell \odot \frac1m \sum_{k=0}^{m-1}
              \frac{\partial P(y \mid a_\ell := \lambda_k a_\ell)}{\partial a_\ell}, \qquad \lambda_k = \frac k{m-1}

    (Dai et al. 2022, eq. 3, with the points of the public code; a single point is :math:`\lambda = 0`.)

    Args:
        model: The language model.
        layers: Layers to attribute, ascending.
        questions: ``n`` prompts with the token that follows.
        options: Points and site.

    Returns:
        Per layer the attributions, shape ``(n, neurons)``, fp32 at least.
    """
    parts: list[dict[int, Tensor]] = []
    longest = max(len(question.ids) for question in questions)
    size = max(1, options.token_budget // (options.steps * longest))
    for first in range(0, len(questions), size):
        parts.append(_Attribution(model, layers, questions[first : first + size], options).run())
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


class _Attribution:
    """One batch of questions; every question is ``steps`` rows, one for each point of the Riemann sum."""

    def __init__(
        self, model: LanguageModel, layers: Sequence[int], questions: Sequence[NextToken], options: AttributionOptions
    ) -> None:
        self.layers, self.options = layers, options
        ids, mask = model.tokens.pad([question.ids for question in questions], model.device)
        self.token = torch.tensor([question.token for question in questions], device=model.device)
        fitting = options.token_budget // (options.steps * ids.numel())
        self.together = max(1, min(options.layers_together, fitting))
        self.activation: dict[int, Tensor] = {}
        self.problem = self._problem(model, ids, mask)

    def _problem(self, model: LanguageModel, ids: Tensor, mask: Tensor) -> PatchedNeurons:
        """Read the activations; return the fast path if it agrees with the whole model, the plain one otherwise."""
        rows, last = torch.arange(len(ids), device=ids.device), mask.sum(1) - 1
        sites = [self.options.module(model, layer) for layer in self.layers]
        repeated = rows.repeat_interleave(self.options.steps)

        def at_last(seen: Recorder, first: int) -> dict[int, Tensor]:
            return {layer: seen.inputs[first + i][rows, last] for i, layer in enumerate(self.layers)}

        @torch.no_grad()
        def upper() -> tuple[PatchedNeurons, dict[int, Tensor]] | None:
            lowest, joins, _ = self.layers[0], model.joins(self.layers[0]), model.block_returns_tuple
            mlps = [mlp for layer in self.layers if (mlp := model.mlp(layer)) is not None]
            with capture(inputs=[*sites, *mlps], stop=False, rows=len(ids)) as seen:
                forward = CachedForward(model, self.layers[0], ids, mask, last, rows, last, above=self.layers[1:])
            found, of_mlp = at_last(seen, 0), at_last(seen, len(sites)) if mlps else {}
            unpatched = UpperPatched(model, self.options, forward, of_mlp, rows)
            if not joins or not agrees(unpatched.logits({lowest: found[lowest]}), forward.base_logits):
                return None
            return UpperPatched(model, self.options, forward, of_mlp, repeated), found

        fast = model.fast_path.attempt("neuron attribution", upper) if self.options.fast else None
        if fast is None:
            with torch.no_grad(), capture(inputs=sites, rows=len(ids)) as seen:
                model(ids, mask)
            fast = WholePatched(model, self.options, ids[repeated], mask[repeated]), at_last(seen, 0)
        problem, found = fast
        self.activation = {layer: a.to(torch.promote_types(a.dtype, torch.float32)) for layer, a in found.items()}
        return problem

    def run(self) -> dict[int, Tensor]:
        """Return the attributions by layer."""
        found: dict[int, Tensor] = {}
        for first in range(0, len(self.layers), self.together):
            found |= self._several(self.layers[first : first + self.together])
        return found

    def _several(self, layers: Sequence[int]) -> dict[int, Tensor]:
        steps = self.options.steps
        patched = {}
        for layer in layers:
            activation = self.activation[layer]
            points = torch.linspace(0, 1, steps, dtype=activation.dtype, device=activation.device)
            patched[layer] = (points[:, None] * activation[:, None]).flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            logits = self.problem.logits(patched)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            token = self.token.repeat_interleave(steps).repeat(len(layers))
            log_p = log_p.gather(1, token[:, None])[:, 0]
        gradients = torch.autograd.grad(log_p.sum(), list(patched.values()))
        # dP = P dlog P, so that in 16 bits the gradient of a small probability does not vanish on its way down.
        probabilities = log_p.detach().exp().unflatten(0, (len(layers), -1, steps))
        return {
            layer: self.activation[layer] * (gradient.unflatten(0, (-1, steps)) * p[..., None]).mean(1)
            for layer, gradient, p in zip(layers, gradients, probabilities, strict=True)
        }
