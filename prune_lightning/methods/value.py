r"""The value optimiser of locate-then-edit methods: find the :math:`v^*` that makes the model generate the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from prune_lightning.distributed import take_first
from prune_lightning.methods.value_graph import CapturedStep
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
from prune_lightning.ranges import Count, NonNegative, Positive

FAST = "the value optimisation"
GRAPH = "a value step as a CUDA graph"


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
        graph: On a GPU, record the second step as a CUDA graph and replay it for the others, since launching a step's
            kernels takes longer than they do. Needs memory for one more step.
        anchor: Rescale each solved value: ``none``; ``mean``, to the mean norm of values solved on the unedited model;
            ``cap``, to that norm at most; ``own``, to the norm that the same shift gives on the unedited model.
        anchor_norm: That mean norm; ``None`` to measure it on the stream's first ``pilots`` requests before any edit.
            Without an anchor, values are compared with it.
        pilots: Number of these requests. They are solved without prefixes.
        early_stop: Stop a request after so many steps in which the target is the most probable answer after every
            prefix; ``None`` to rely on ``stop_loss`` alone (ENCORE has 2 to 4).
    """

    steps: Count = 20
    learning_rate: Positive = 0.5
    weight_decay: NonNegative = 0.5
    kl_factor: NonNegative = 0.0625
    clamp: Positive = 4.0
    stop_loss: NonNegative = 0.05
    token_budget: Count = 65_536
    fast: bool = True
    graph: bool = False
    anchor: str = "none"
    anchor_norm: Positive | None = None
    pilots: Count = 100
    early_stop: Count | None = None


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
    below ``stop_loss`` leaves the batch. One whose target ends without a finite likelihood gets NaN as its value, so
    that its update is refused.

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
        self.sharded = model.is_sharded
        self.layout = Layout(model, requests)
        self.site = site
        upper = model.fast_path.attempt(FAST, self._upper) if options.fast else None
        self.problem: ValueProblem = upper or WholeForward(model, site, self.layout)
        self.reference = self.problem.reference.to(torch.promote_types(self.problem.reference.dtype, torch.float32))
        self.reference_norm = self.reference.norm(dim=1)
        self.delta = torch.zeros_like(self.reference)
        self.moments = torch.zeros_like(self.delta), torch.zeros_like(self.delta)
        self.base_log_p = self._log_p(self.problem.base_logits)[len(self.layout.label) :]
        count = len(requests)
        self.current = torch.arange(count, device=model.device)
        self.active = torch.ones(count, dtype=torch.bool, device=model.device)
        self.clamped = torch.zeros_like(self.active)
        self.nll = torch.full((count,), torch.nan, dtype=torch.float64, device=model.device)
        self.updates = torch.zeros(count, dtype=torch.long, device=model.device)
        self._captured: CapturedStep | None = None
        self._settled = False  # whether a step has run with the present rows, so that nothing is left to find out
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
        """Optimise until every request is done, at most ``steps`` steps.

        A step asks the device once, for the number of requests that go on. The others' gradients are computed with
        theirs until the batch is compacted, and not used.
        """
        for step in range(1, self.options.steps + 1):
            loss, nll, hit, differentiate = self._step(self.delta[self.current])
            active = self._record(loss, nll, hit)
            remaining = 0 if step == self.options.steps else int(active.sum())
            if not remaining:
                break
            self._adam(active, differentiate(), step)
            if remaining <= 0.75 * len(active):
                self._compact(active)
        target = (self.reference + self.delta).masked_fill(~torch.isfinite(self.nll)[:, None], torch.nan)
        return Values(target, self.reference, self._details())

    def _step(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]:
        """Return losses, negative log-likelihoods, whether all labels are on top, and what returns the gradient."""
        pays = self.options.steps - len(self.losses) > 2
        graph = self.options.graph and not self.sharded
        if graph and self._settled and shift.is_cuda and self._captured is None and pays:
            self._captured = self.model.fast_path.attempt(GRAPH, lambda: CapturedStep(self._both, shift))
        if self._captured is not None:
            loss, nll, hit, gradient = self._captured(shift)
            return loss, nll, hit, lambda: gradient
        shift = shift.requires_grad_()
        with torch.enable_grad():
            loss, nll, hit = self._loss(shift)
        self._settled = True
        return loss.detach(), nll.detach(), hit, lambda: torch.autograd.grad(loss.sum(), [shift])[0]

    def _both(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift = shift.detach().requires_grad_()
        with torch.enable_grad():
            loss, nll, hit = self._loss(shift)
        return loss.detach(), nll.detach(), hit, torch.autograd.grad(loss.sum(), [shift])[0]

    def _record(self, loss: Tensor, nll: Tensor, hit: Tensor) -> Tensor:
        """Note the losses of the requests that were not done, and return which of the current ones go on."""
        active = self.active[self.current]
        row = torch.full_like(self.nll, torch.nan)
        row[self.current] = torch.where(active, loss.double(), torch.nan)
        self.losses.append(row)
        self.nll[self.current] = torch.where(active, nll.double(), self.nll[self.current])
        active = active & (loss >= self.options.stop_loss)
        self.hits[self.current] += hit
        if self.options.early_stop is not None:
            active = active & (self.hits[self.current] < self.options.early_stop)
        if self.sharded:  # rounding must not decide otherwise on another process, which takes part in the same passes
            take_first(active)
        self.active[self.current] = active
        return active

    def _loss(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the target's negative log-likelihood, and whether all labels are on top, by request."""
        layout, options = self.layout, self.options
        log_p = self._log_p(self._logits(shift))
        labels = -log_p[: len(layout.label)].gather(1, layout.label[:, None])[:, 0]
        zeros = torch.zeros(len(shift), dtype=labels.dtype, device=labels.device)
        nll = zeros.index_add(0, layout.label_owner, labels * layout.label_weight.to(labels))
        kl_log_p = log_p[len(layout.label) :]
        kl = (kl_log_p.exp() * (kl_log_p - self.base_log_p[self.current])).sum(-1)
        hit = torch.zeros_like(zeros, dtype=torch.bool)
        if options.early_stop is not None:  # else nothing asks for it, and on a CPU it takes as long as the softmax
            missed = (log_p[: len(layout.label)].argmax(-1) != layout.label).to(zeros)
            hit = zeros.detach().index_add(0, layout.label_owner, missed) == 0
        decay = shift.norm(dim=1) / self.reference_norm[self.current] ** 2
        return nll + options.kl_factor * kl + options.weight_decay * decay, nll, hit

    @torch.no_grad()
    def _adam(self, active: Tensor, gradient: Tensor, step: int) -> None:
        """Take one step of Adam (Kingma & Ba, 2015) for the active ones of the current requests; clamp their shifts."""
        who, moments = self.current, []
        for moment, value, beta in zip(self.moments, (gradient, gradient.square()), (0.9, 0.999), strict=True):
            moments.append(beta * moment[who] + (1 - beta) * value)
            moment[who] = moments[-1]  # those of finished requests are not read again
        first, second = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
        before = self.delta[who]
        delta = before - self.options.learning_rate * first / (second.sqrt() + 1e-8)
        limit, norm = self.options.clamp * self.reference_norm[who], delta.norm(dim=1)
        delta = delta * torch.where(norm > limit, limit / norm, 1.0)[:, None]
        self.clamped[who] |= active & (norm > limit)
        self.delta[who] = torch.where(active[:, None], delta, before)
        self.updates[who] += active

    def _compact(self, active: Tensor) -> None:
        """Drop the rows of finished requests, which are a quarter of the batch or more."""
        self._captured, self._settled = None, False
        self.problem.select(torch.nonzero(active[self.layout.owner])[:, 0])
        self.current = self.current[active]
        self.layout = Layout(self.model, [self.requests[i] for i in self.current.tolist()])

    def _details(self) -> list[dict[str, Any]]:
        found = (torch.stack(self.losses, dim=1), self.updates, (-self.nll).exp(), self.clamped)
        return [
            {"steps": updates, "losses": row[: updates + 1], "target_probability": probability, "clamped": clamped}
            for row, updates, probability, clamped in zip(*(each.tolist() for each in found), strict=True)
        ]
