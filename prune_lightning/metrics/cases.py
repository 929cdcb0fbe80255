"""Means over cases, the base of the editing metrics, which are correct in distributed runs, too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prune_lightning.errors import UserError, one_of
from prune_lightning.metrics.functional import first_of_each, mean_by_case

_EXACT = 2**24


class CaseMeans(Metric):
    """Named values per prompt, averaged over the prompts of a case, then over cases.

    Each value is stored with its case and its prompt. Duplicates, such as those of a distributed sampler that pads its
    last batch, are counted once. States are always in single precision, since a process without data contributes an
    empty tensor of that dtype.

    Args:
        means: Names whose values are averaged.
        counts: Names whose values are summed.
        kwargs: See :class:`torchmetrics.Metric`.

    Examples:
        >>> metric = CaseMeans(["accuracy"])
        >>> metric.update("accuracy", torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 4, 7]))
        >>> metric.update("accuracy", torch.tensor([1.0]), torch.tensor([7]))  # the same case again
        >>> metric.compute()
        {'accuracy': tensor(0.7500)}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    name: list[Tensor]
    case: list[Tensor]
    prompt: list[Tensor]
    value: list[Tensor]

    def __init__(self, means: Sequence[str], counts: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.means, self.counts = tuple(means), tuple(counts)
        for state in ("name", "case", "prompt", "value"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, name: str, values: Tensor, case: Tensor, prompt: Tensor | None = None) -> None:
        """Add values of one name.

        Args:
            name: One of ``means`` and ``counts``.
            values: Shape ``(n,)``.
            case: Number of each value's case, shape ``(n,)``.
            prompt: Number of each value's prompt within its case, shape ``(n,)``; if not given they are counted, and
                all prompts of a case have to come in the same call.

        Raises:
            UserError: An unknown name, lengths that differ, or a number that single precision cannot represent.
        """
        one_of("name", name, (*self.means, *self.counts))
        prompt = _counted(case) if prompt is None else prompt
        if not len(values) == len(case) == len(prompt):
            raise UserError(
                f"{name}: expected as many cases and prompts as values, but got lengths "
                f"{len(values)}, {len(case)}, {len(prompt)}"
            )
        if len(case) and int(case.max()) >= _EXACT:
            raise UserError(f"cases are expected to be numbers below {_EXACT}, but got {int(case.max())}")
        index = (*self.means, *self.counts).index(name)
        name_of_each = torch.full_like(values, index, dtype=torch.float32)
        for state, tensor in (
            (self.name, name_of_each),
            (self.case, case),
            (self.prompt, prompt),
            (self.value, values),
        ):
            state.append(tensor.to(self.device, torch.float32))

    def _once(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return name, case and value of every prompt, without duplicates."""
        name, case, prompt, value = (
            dim_zero_cat(state) if len(state) else torch.zeros(0, device=self.device)
            for state in (self.name, self.case, self.prompt, self.value)
        )
        once = first_of_each(name, case, prompt) if len(name) else name.long()
        return name[once], case[once], value[once].double()

    def compute(self) -> dict[str, Tensor]:
        """Return each name's mean over cases, NaN without cases, or its sum."""
        name, case, value = self._once()
        result = {}
        for index, key in enumerate((*self.means, *self.counts)):
            here = name == index
            values = mean_by_case(value[here], case[here]).mean() if key in self.means else value[here].sum()
            result[key] = values.float()
        return result

    def rows(self, cases: Collection[int]) -> list[dict[str, Any]]:
        """Return a row for each of some cases: ``case``, and its value in each mean that it contributes to."""
        name, case, value = self._once()
        rows: dict[int, dict[str, Any]] = {number: {"case": number} for number in cases}
        for index, key in enumerate(self.means):
            here = name == index
            means = mean_by_case(value[here], case[here]).tolist()
            for number, mean in zip(case[here].unique().tolist(), means, strict=True):
                if number in rows:
                    rows[int(number)][key] = mean
        return list(rows.values())


def _counted(case: Tensor) -> Tensor:
    """Return for each entry the number of earlier entries of the same case."""
    order = case.argsort(stable=True)
    _, length = case[order].unique_consecutive(return_counts=True)
    start = torch.repeat_interleave(length.cumsum(0) - length, length)
    return torch.empty_like(order).scatter(0, order, torch.arange(len(case), device=case.device) - start)
