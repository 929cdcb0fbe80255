"""The value optimisation as the papers state it: one request alone, the whole model, all logits, torch's Adam.

Plain on purpose: what the optimiser of the package computes in another order is compared with this. It costs what the
public code costs: all rows of a request in one batch, no gradients of weights, log-probabilities of every token, and
one gather of the labels.
"""

from __future__ import annotations

import torch

from prune_lightning.methods.value import ValueOptions
from prune_lightning.methods.value_problem import RequestRows, ShiftSite
from prune_lightning.models.hooks import edit_output
from prune_lightning.models.language_model import LanguageModel


def plain_value(model: LanguageModel, request: RequestRows, site: ShiftSite, options: ValueOptions):
    """Return the value, its reference, the losses, and whether the shift was clamped."""
    rows = request.all
    ids, mask = model.tokens.pad([row.ids for row in rows], model.device)
    delta, reference, base, optimizer, losses, clamped = None, None, None, None, [], False

    def add(output):
        nonlocal delta, reference
        if delta is None:
            reference = output[0, rows[0].subject].detach().to(torch.promote_types(output.dtype, torch.float32))
            delta = torch.zeros_like(reference, requires_grad=True)
        output = output.clone()
        for i, row in enumerate(rows):
            output[i, row.subject] += delta.to(output.dtype)
        return output

    targets = request.targets
    labels = [
        (i, at, token)
        for i, row in enumerate(targets)
        for at, token in zip(row.label_positions, row.target, strict=True)
    ]
    where = tuple(torch.tensor(labels, device=model.device).T)
    count = torch.tensor([len(targets[i].target) * len(targets) for i, _, _ in labels], device=model.device)
    for step in range(options.steps):
        with edit_output(site.module(model), add):
            logits = model(ids, mask)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        loss = -(log_p[where] / count).sum()
        at_subject = log_p[len(rows) - 1, request.divergence.subject]
        base = at_subject.detach() if base is None else base
        loss = loss + options.kl_factor * (at_subject.exp() * (at_subject - base)).sum()
        loss = loss + options.weight_decay * delta.norm() / reference.norm() ** 2
        losses.append(loss.item())
        if losses[-1] < options.stop_loss or step == options.steps - 1:
            break
        optimizer = optimizer or torch.optim.Adam([delta], lr=options.learning_rate)
        optimizer.zero_grad()
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        optimizer.step()
        with torch.no_grad():
            limit = options.clamp * reference.norm()
            if delta.norm() > limit:
                clamped = True
                delta *= limit / delta.norm()
    return reference + delta.detach(), reference, losses, clamped
