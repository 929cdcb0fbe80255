r"""The value optimiser of locate-and-edit methods: find the :math:`v^*` that makes the model generate the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from prune_lightning.methods.value_problem import (
    Layout,
    RequestRows,
    ShiftSite,
    UpperForward,
    ValueProblem,
    WholeForward,
)
from prune_lightning.models.fast_path import agrees
from prune_lightning.models.language_model import LanguageModel

FAST = "the value optimisation"


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
        token_budget: Padded tokens of the requests that are optimised together; halved when memory runs out.
        fast: Run only what depends on the shift. The plain path computes the same from the whole model.
        anchor: Rescale each solved value: ``none``; ``mean``, to the mean norm of values solved on the unedited model;
            ``cap``, to that norm at most; ``own``, to the norm that the same shift gives on the unedited model.
        anchor_norm: That mean norm; ``None`` to measure it on the stream's first ``pilots`` requests before any edit.
        pilots: Number of these requests. They are solved without prefixes.
        early_stop: Stop a request after so many steps in which the target is the most probable answer after every
            prefix; ``None`` to rely on ``stop_loss`` alone (ENCORE has 2 to 4).
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.05
    token_budget: int = 65_536
    fast: bool = True
    anchor: str = "none"
    anchor_norm: float | None = None
    pilots: int = 100
    early_stop: int | None = None


@dataclass(frozen=True)
class Values:
    """Optimised values of ``b`` requests.

    Args:
        target: :math:`v^*`, shape ``(b, width)``.
        reference: What is shifted, at the clean prompt's subject, shape ``(b, width)``.
        details: Per request: updates made, loss before each and at the end, final probability of the target, whether
            the shift was clamped.
    """

    target: Tensor
    reference: Tensor
    details: list[dict[str, Any]]


def optimise_values(
    model: LanguageModel, requests: Sequence[RequestRows], site: ShiftSite, options: ValueOptions
) -> Values:
    r"""Optimise one shift :math:`\delta` per request, as many requests in one batch as memory allows.

    :math:`\delta` is added to the output of the site at the subject's last token of every row. Per request,

    .. math:: \mathcal L = \frac1R \sum_r \frac1T \sum_j -\log p(t_j) + \beta\,\mathrm{KL}(P_\delta \| P_0)
              + \omega \|\delta\|_2 / \|\mathrm{ref}\|_2^2

    (ROME, Meng et al. 2022, eq. 4, with the divergence read at the subject as the published code does). Losses are
    summed over requests and Adam is elementwise, so each request is optimised as it would be alone. One whose loss is
    below ``stop_loss`` leaves the batch.

    Args:
        model: The language model.
        requests: Token rows of the requests.
        site: Where the shift enters.
        options: Hyper-parameters.
    """
    budget, done, parts = options.token_budget, 0, []
    while done < len(requests):
        part = _fitting(requests[done:], budget)
        try:
            parts.append(_Optimisation(model, part, site, options).run())
            done += len(part)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        # Outside the handler, so that the tensors of the attempt are freed.
        torch.cuda.empty_cache()
        budget = sum(len(row.ids) for request in part for row in request.all) // 2
        rank_zero_info(f"out of memory with {len(part)} requests at once; continuing with half as many tokens")
    return Values(
        torch.cat([part.target for part in parts]),
        torch.cat([part.reference for part in parts]),
        [detail for part in parts for detail in part.details],
    )


def _fitting(requests: Sequence[RequestRows], budget: int) -> Sequence[RequestRows]:
    """Return the first requests whose padded rows stay within the budget, one at least."""
    rows, longest = 0, 0
    for count, request in enumerate(requests):
        rows, longest = rows + len(request.all), max(longest, *(len(row.ids) for row in request.all))
        if count and rows * longest > budget:
            return requests[:count]
    return requests


class _Optimisation:
    """The optimisation of one batch of requests. Tensors are over all requests; ``current`` are those not done yet."""

    def __init__(
        self, model: LanguageModel, requests: Sequence[RequestRows], site: ShiftSite, options: ValueOptions
    ) -> None:
        self.model, self.requests, self.options = model, requests, options
        self.layout = Layout(model, requests)
        self.site = site
        upper = model.fast_path.attempt(FAST, self._upper) if options.fast else None
        self.problem: ValueProblem = upper or WholeForward(model, site, self.layout)
        self.reference = self.problem.reference.to(torch.promote_types(self.problem.reference.dtype, torch.float32))
        self.delta = torch.zeros_like(self.reference)
        self.moments = torch.zeros_like(self.delta), torch.zeros_like(self.delta)
        self.base_log_p = self._log_p(self.problem.base_logits)[len(self.layout.label) :]
        count = len(requests)
        self.current = torch.arange(count, device=model.device)
        self.active = torch.ones(count, dtype=torch.bool, device=model.device)
        self.clamped = torch.zeros_like(self.active)
        self.nll = torch.full((count,), torch.nan, dtype=torch.float64, device=model.device)
        self.updates = torch.zeros(count, dtype=torch.long, device=model.device)
        self.losses: list[Tensor] = []  # per step, NaN for requests that are done
        self.hits = torch.zeros_like(self.updates)  # steps in which every label was the most probable token

    def _logits(self, shift: Tensor) -> Tensor:
        """Return the logits that the layout reads.

        The first shifts are zero. If the fast path differs from the whole model there, the plain path is used.
        """
        if self.losses or not isinstance(self.problem, UpperForward):
            return self.problem.logits(self.layout, shift)

        def checked() -> Tensor | None:
            logits = self.problem.logits(self.layout, shift)
            return logits if agrees(logits.detach(), self.problem.base_logits) else None

        logits = self.model.fast_path.attempt(FAST, checked)
        if logits is not None:
            return logits
        self.problem = WholeForward(self.model, self.site, self.layout)
        return self.problem.logits(self.layout, shift)

    def _upper(self) -> UpperForward | None:
        """Return the fast path, unless it is unknown how a shift of the down-projection affects the block's output."""
        if self.site.at == "mlp" and not self.model.joins(self.site.layer):
            return None
        return UpperForward(self.model, self.site, self.layout)

    @staticmethod
    def _log_p(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def run(self) -> Values:
        """Optimise until every request is done, at most ``steps`` steps."""
        for step in range(1, self.options.steps + 1):
            shift = self.delta[self.current].requires_grad_()
            with torch.enable_grad():
                loss, nll, hit = self._loss(shift)
            active = self.active[self.current]
            row = torch.full_like(self.nll, torch.nan)
            row[self.current[active]] = loss.detach()[active].double()
            self.losses.append(row)
            self.nll[self.current[active]] = nll.detach()[active].double()
            active &= loss.detach() >= self.options.stop_loss
            self.hits[self.current] += hit
            if self.options.early_stop is not None:
                active &= self.hits[self.current] < self.options.early_stop
            self.active[self.current] = active
            if step == self.options.steps or not active.any():
                break
            (gradient,) = torch.autograd.grad(loss[active].sum(), [shift])
            self._adam(self.current[active], gradient[active], step)
            self._compact()
        return Values(self.reference + self.delta, self.reference, self._details())

    def _loss(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the target's negative log-likelihood, and whether all labels are on top, by request."""
        layout, options = self.layout, self.options
        log_p = self._log_p(self._logits(shift))
        labels = -log_p[: len(layout.label)].gather(1, layout.label[:, None])[:, 0]
        zeros = torch.zeros(len(shift), dtype=labels.dtype, device=labels.device)
        nll = zeros.index_add(0, layout.label_owner, labels * layout.label_weight.to(labels))
        kl_log_p = log_p[len(layout.label) :]
        kl = (kl_log_p.exp() * (kl_log_p - self.base_log_p[self.current])).sum(-1)
        missed = (log_p[: len(layout.label)].argmax(-1) != layout.label).to(zeros)
        hit = zeros.detach().index_add(0, layout.label_owner, missed) == 0
        decay = shift.norm(dim=1) / self.reference[self.current].norm(dim=1) ** 2
        return nll + options.kl_factor * kl + options.weight_decay * decay, nll, hit

    @torch.no_grad()
    def _adam(self, who: Tensor, gradient: Tensor, step: int) -> None:
        """Take one step of Adam (Kingma & Ba, 2015) for some requests, and clamp their shifts."""
        for moment, value, beta in zip(self.moments, (gradient, gradient.square()), (0.9, 0.999), strict=True):
            moment[who] = beta * moment[who] + (1 - beta) * value
        first, second = self.moments[0][who] / (1 - 0.9**step), self.moments[1][who] / (1 - 0.999**step)
        delta = self.delta[who] - self.options.learning_rate * first / (second.sqrt() + 1e-8)
        limit, norm = self.options.clamp * self.reference[who].norm(dim=1), delta.norm(dim=1)
        self.clamped[who] |= norm > limit
        self.delta[who] = delta * torch.where(norm > limit, limit / norm, 1.0)[:, None]
        self.updates[who] += 1

    def _compact(self) -> None:
        """Drop the rows of finished requests once they are a quarter of the batch."""
        active = self.active[self.current]
        if int(active.sum()) > 0.75 * len(active):
            return
        self.problem.select(torch.nonzero(active[self.layout.owner])[:, 0])
        self.current = self.current[active]
        self.layout = Layout(self.model, [self.requests[int(i)] for i in self.current])

    def _details(self) -> list[dict[str, Any]]:
        losses = torch.stack(self.losses, dim=1).tolist()
        return [
            {
                "steps": int(updates),
                "losses": row[: int(updates) + 1],
                "target_probability": float((-nll).exp()),
                "clamped": bool(clamped),
            }
            for row, updates, nll, clamped in zip(losses, self.updates, self.nll, self.clamped, strict=True)
        ]
