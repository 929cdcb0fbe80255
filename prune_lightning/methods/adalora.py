"""AdaLoRA: adaptive budget allocation for low-rank adaptation (Zhang et al., ICLR 2023, https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraModel
from torch import Tensor, nn

from prune_lightning.errors import UserError
from prune_lightning.methods.lora import ADAPTER, LoRA
from prune_lightning.ranges import Count, NonNegative
from prune_lightning.types import LowRankUpdate


class AdaLoRA(LoRA):
    r"""Train :math:`\Delta = \frac{\alpha}{r_0} P \Lambda Q` and prune it to the singular values that matter most.

    ``peft``'s allocator runs after each step and knows the total number of steps. It cuts the total rank over all
    adapted modules from ``initial_rank`` each to ``rank`` each on a cubic schedule, which the last step completes. With
    ``keep=true`` each edit starts the schedule again.

    .. math:: \mathcal L = \mathcal L_{\text{target}} + \gamma\, \frac{1}{2n} \sum_{m=1}^{n}
              \bigl(\lVert P_m^\top P_m - I \rVert_F + \lVert Q_m Q_m^\top - I \rVert_F\bigr)

    Args:
        initial_rank: :math:`r_0`, more than ``rank``.
        orthogonality: :math:`\gamma`.
        kwargs: See :class:`LoRA`; ``rank`` is the mean rank after pruning.

    Raises:
        UserError: ``initial_rank`` is not above ``rank``, or there is only one step, which cannot prune.
    """

    def __init__(self, *, initial_rank: Count = 12, orthogonality: NonNegative = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if initial_rank <= self.rank or self.steps < 2 or orthogonality < 0:
            raise UserError(
                "AdaLoRA's method.initial_rank is expected to be more than method.rank, method.steps to be at least 2, "
                f"and method.orthogonality not to be negative, but got {initial_rank}, {self.rank}, {self.steps} and "
                f"{orthogonality}"
            )
        self.initial_rank, self.orthogonality = initial_rank, orthogonality

    def inject(self, model: nn.Module, total_steps: int) -> LoraModel:
        """Add adapters to ``model`` and set the allocator's number of steps."""
        config = AdaLoraConfig(init_r=self.initial_rank, target_r=self.rank, total_step=total_steps, **self.settings())
        return AdaLoraModel(model, {ADAPTER: config}, ADAPTER)

    def merged(self, module: Any) -> LowRankUpdate:
        r"""Return :math:`\frac{\alpha}{r_0} P \Lambda Q` of one of ``peft``'s layers, without what was pruned."""
        left, values, right = (part[ADAPTER].detach() for part in (module.lora_B, module.lora_E, module.lora_A))
        alive = values[:, 0] != 0
        scale = module.scaling[ADAPTER] / (module.ranknum[ADAPTER].detach() + 1e-5)  # as in the layer's forward
        return LowRankUpdate(left[:, alive] * values[alive, 0] * scale, right[alive].T.clone())

    def penalty(self) -> Tensor | float:
        """Return the orthogonality penalty; ``peft`` adds its own only to a loss that the model computes."""
        layers = [self.adapted(name) for name in self.edited_modules()]
        grams = [layer.lora_B[ADAPTER].T @ layer.lora_B[ADAPTER] for layer in layers]
        grams += [layer.lora_A[ADAPTER] @ layer.lora_A[ADAPTER].T for layer in layers]
        identity = torch.eye(self.initial_rank).to(grams[0])
        return self.orthogonality * torch.linalg.matrix_norm(torch.stack(grams) - identity).mean()

    def stepped(self, tuner: LoraModel, step: int) -> None:
        """Let the allocator prune."""
        assert isinstance(tuner, AdaLoraModel)
        tuner.update_and_allocate(step)
