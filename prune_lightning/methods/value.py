r"""The value optimiser of the locate-and-edit family: find the :math:`v^*` that makes the model say the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lightning.methods.prompts import EditRow
from prune_lightning.models.hooks import edit_output
from prune_lightning.models.language_model import LanguageModel


@dataclass(frozen=True)
class ValueOptions:
    """Hyper-parameters of the value optimisation; the defaults are ROME's for GPT-2 XL.

    Args:
        steps: Forward passes; the last one makes no update, so there are at most ``steps - 1`` updates.
        learning_rate: Adam's learning rate.
        weight_decay: Weight of the norm of the shift.
        kl_factor: Weight of the divergence on the prompt "{subject} is a".
        clamp: Largest norm of the shift, in units of the reference's norm.
        stop_loss: Stop a request whose loss falls below this.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.05


@dataclass(frozen=True)
class Values:
    """Optimised values of ``b`` requests.

    Args:
        target: :math:`v^*`, shape ``(b, width)``.
        reference: The module's output at the clean prompt's subject, shape ``(b, width)``.
        details: Per request: steps, last loss, probability of the target, whether the shift was clamped.
    """

    target: Tensor
    reference: Tensor
    details: list[dict[str, Any]]


@dataclass(frozen=True)
class _Layout:
    """Where in the padded batch the shift enters and the loss is read; one entry per row or per label."""

    ids: Tensor
    mask: Tensor
    owner: Tensor  # request of each row
    subject: Tensor  # position of the subject's last token in each row
    clean: Tensor  # row of each request's clean prompt
    kl_rows: Tensor  # row of each request's KL prompt
    label_row: Tensor
    label_position: Tensor
    label: Tensor
    label_weight: Tensor  # 1 / (rows of the request * tokens of its target)


def _lay_out(model: LanguageModel, rows: Sequence[Sequence[EditRow]], kl_rows: Sequence[EditRow]) -> _Layout:
    flat = [row for group in rows for row in group] + list(kl_rows)
    ids, mask = model.tokens.pad([row.ids for row in flat], model.device)
    owner: list[int] = []
    clean: list[int] = []
    label_row: list[int] = []
    label_position: list[int] = []
    label: list[int] = []
    weight: list[float] = []
    for request, group in enumerate(rows):
        clean.append(len(owner))
        for row in group:
            label_row += [len(owner)] * len(row.target)
            label_position += row.label_positions
            label += row.target
            weight += [1.0 / (len(group) * len(row.target))] * len(row.target)
            owner.append(request)
    kl = list(range(len(owner), len(flat)))
    owner += range(len(kl_rows))

    def long(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=model.device)

    return _Layout(
        ids,
        mask,
        long(owner),
        long([row.subject for row in flat]),
        long(clean),
        long(kl),
        long(label_row),
        long(label_position),
        long(label),
        torch.tensor(weight, dtype=torch.float64, device=model.device),
    )


def optimise_values(
    model: LanguageModel,
    rows: Sequence[Sequence[EditRow]],
    kl_rows: Sequence[EditRow],
    module: nn.Module,
    options: ValueOptions,
) -> Values:
    r"""Optimise one shift :math:`\delta` per request, all requests in one batch.

    :math:`\delta` is added to ``module``'s output at the subject's last token of every row. Per request,

    .. math:: \mathcal L = \frac1R \sum_r \frac1T \sum_j -\log p(t_j) + \beta\,\mathrm{KL}(P_\delta \| P_0)
              + \omega \|\delta\|_2 / \|\mathrm{ref}\|_2^2

    (ROME, Meng et al. 2022, eq. 4, with the divergence read at the subject as the published code does). Losses are
    summed over requests and Adam is elementwise, so each request goes the way it would go alone; one whose loss is
    below ``stop_loss`` is frozen.

    Args:
        model: The language model.
        rows: Per request its rows, the clean prompt first.
        kl_rows: Per request the row on which the divergence is taken.
        module: Where the shift enters: an MLP (ROME) or a block (MEMIT).
        options: Hyper-parameters.
    """
    layout = _lay_out(model, rows, kl_rows)
    count = len(rows)
    at_rows = torch.cat([layout.label_row, layout.kl_rows])
    at_positions = torch.cat([layout.label_position, layout.subject[layout.kl_rows]])
    label_owner = layout.owner[layout.label_row]
    state: dict[str, Tensor] = {}

    def shift(output: Tensor) -> Tensor:
        everywhere = torch.arange(len(output), device=output.device)
        if "delta" not in state:
            precise = torch.promote_types(output.dtype, torch.float32)
            state["reference"] = output[layout.clean, layout.subject[layout.clean]].detach().to(precise)
            state["delta"] = torch.zeros_like(state["reference"], requires_grad=True)
        output = output.clone()
        output[everywhere, layout.subject] += state["delta"][layout.owner].to(output.dtype)
        return output

    optimizer: torch.optim.Optimizer | None = None
    base_log_p: Tensor | None = None
    active = torch.ones(count, dtype=torch.bool, device=model.device)
    steps = torch.zeros(count, dtype=torch.long, device=model.device)
    clamped = torch.zeros(count, dtype=torch.bool, device=model.device)
    final_loss = torch.full((count,), float("nan"), dtype=torch.float64, device=model.device)
    final_nll = final_loss.clone()
    for step in range(options.steps):
        with torch.enable_grad(), edit_output(module, shift):
            logits = model.logits_at(layout.ids, layout.mask, at_rows, at_positions)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            delta, reference = state["delta"], state["reference"]
            losses = -log_p[: len(layout.label)].gather(1, layout.label[:, None])[:, 0]
            zeros = torch.zeros(count, dtype=losses.dtype, device=losses.device)
            nll = zeros.index_add(0, label_owner, losses * layout.label_weight.to(losses))
            kl_log_p = log_p[len(layout.label) :]
            base_log_p = kl_log_p.detach() if base_log_p is None else base_log_p
            kl = (kl_log_p.exp() * (kl_log_p - base_log_p)).sum(-1)
            decay = options.weight_decay * delta.norm(dim=1) / reference.norm(dim=1) ** 2
            loss = nll + options.kl_factor * kl + decay
        final_loss = torch.where(active, loss.detach().double(), final_loss)
        final_nll = torch.where(active, nll.detach().double(), final_nll)
        active = active & (loss.detach() >= options.stop_loss)
        if step == options.steps - 1 or not active.any():
            break
        optimizer = optimizer or torch.optim.Adam([delta], lr=options.learning_rate)
        (delta.grad,) = torch.autograd.grad(loss[active].sum(), [delta])
        before = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            limit = options.clamp * reference.norm(dim=1)
            norm = delta.norm(dim=1)
            too_long = norm > limit
            delta.mul_(torch.where(too_long, limit / norm, torch.ones_like(norm))[:, None])
            delta[~active] = before[~active]
        clamped |= too_long & active
        steps += active
    details = [
        {"steps": int(s), "loss": float(f), "target_probability": float((-n).exp()), "clamped": bool(c)}
        for s, f, n, c in zip(steps, final_loss, final_nll, clamped, strict=True)
    ]
    return Values(state["reference"] + state["delta"].detach(), state["reference"], details)
