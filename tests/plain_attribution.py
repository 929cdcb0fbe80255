"""Integrated gradients of neurons as the paper states them: one question, one layer, one point at a time, whole model.

Slow and plain on purpose: what the package computes in another order is compared with this.
"""

from __future__ import annotations

import torch

from prune_lightning.methods.neuron_attribution import NextToken
from prune_lightning.methods.patched_neurons import AttributionOptions
from prune_lightning.models.hooks import edit_input
from prune_lightning.models.language_model import LanguageModel


def plain_attribution(model: LanguageModel, layer: int, question: NextToken, options: AttributionOptions):
    """Return the attributions of one layer, shape ``(neurons,)``."""
    ids, mask = model.tokens.pad([question.ids], model.device)
    site = options.module(model, layer)
    total = 0
    for point in torch.linspace(0, 1, options.steps, dtype=torch.float64).tolist():
        seen = {}

        def patch(value, point=point, seen=seen):
            seen["original"] = value[0, -1].detach()
            seen["patched"] = (point * seen["original"]).requires_grad_()
            return torch.cat([value[:, :-1], seen["patched"][None, None]], dim=1)

        with edit_input(site, patch):
            probability = model(ids, mask)[0, -1].softmax(-1)[question.token]
        total = total + torch.autograd.grad(probability, [seen["patched"]])[0]
    return seen["original"] * total / options.steps
