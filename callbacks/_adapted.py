"""Layers under LoRA: what is restrained is the change of the merged weight, and what is written are its factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prune_lightning.errors import UserError
from prune_lightning.sharding import sharded_like, whole
from prune_lightning.spectral import FactoredMatrix, NonFiniteChange
from prune_lightning.types import LowRankUpdate


class AdaptedMatrix:
    r"""The merged weight of a layer under LoRA, :math:`W = W_0 + s B A`, with :math:`W_0` its frozen base weight.

    The change is the whole product :math:`s B A`, of rank :math:`r`. What a law takes away lies in the row space of
    :math:`A`, so that it is taken from :math:`B` alone, exactly: :math:`B \leftarrow B - L R^\top A^+ / s`.

    Args:
        name: Name of the base layer's weight.
        layer: peft's LoRA layer in the place of a Linear or Conv1D layer.

    Raises:
        UserError: The adapter is not one trained, unmerged LoRA without a variant (such as DoRA).
    """

    def __init__(self, name: str, layer: LoraLayer) -> None:
        active = [adapter for adapter in layer.lora_A if adapter in layer.active_adapters]
        plain = isinstance(layer, LoraLinear) and not layer.lora_variant and not layer.merged
        base = getattr(layer.get_base_layer(), "weight", None)
        frozen = isinstance(base, nn.Parameter) and not base.requires_grad
        if not (plain and frozen and len(layer.lora_A) == len(active) == 1):
            raise UserError(
                f"{name}: of adapters, a restraint serves one plain LoRA on a frozen Linear or Conv1D layer, not "
                "merged and without a variant such as DoRA. Leave this layer out of `parameters`"
            )
        self.name, self._adapter = name, active[0]
        self._layer: Any = layer

    @property
    def _factors(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        layer, adapter = self._layer, self._adapter
        return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, layer.scaling[adapter]

    def original(self) -> Tensor:
        """Return the weight of the base layer, ``out_features x in_features``."""
        weight = whole(self._layer.get_base_layer().weight.detach())
        return weight.T if self._layer.fan_in_fan_out else weight

    def weight(self) -> Tensor:
        """Return the merged weight."""
        return self.original() + self.delta()

    def delta(self) -> Tensor:
        """Return the product of the factors, fp32 at least."""
        update = self._update()
        return update.left @ update.right.T

    def _update(self) -> LowRankUpdate:
        left, right, scale = self._factors
        precise = torch.promote_types(left.dtype, torch.float32)
        return LowRankUpdate(scale * whole(left.detach()).to(precise), whole(right.detach()).to(precise).T)

    @property
    def change(self) -> FactoredMatrix:
        """The product of the factors.

        Raises:
            NonFiniteChange: It holds NaN or infinity.
        """
        update = self._update()
        if not update.is_finite():
            raise NonFiniteChange("the change holds NaN or infinity")
        change = FactoredMatrix(*update.shape, update.left.device)
        change.append(update)
        return change

    def step(self) -> Tensor:
        """Raise a :class:`UserError`: what a mask leaves of a step is not of low rank."""
        raise UserError(
            f"{self.name} is under LoRA, and what is left of a step entry by entry is no product of its factors. "
            "Use a spectral restraint, or train the whole weight"
        )

    def withhold(self, correction: LowRankUpdate | None) -> None:
        """Raise a :class:`UserError`: a product of factors that is trained on is no sum of steps."""
        raise UserError(
            f"{self.name} is under LoRA, where no sum of steps is kept beside the factors: use `accumulate=restrained`"
        )

    @contextmanager
    def withholding(self, correction: LowRankUpdate | None) -> Iterator[None]:
        """Write the factors without ``correction`` inside the block, then restore them bit for bit."""
        left = self._factors[0]
        saved = left.detach().clone()
        if correction is not None:
            self.subtract(correction)
        try:
            yield
        finally:
            with torch.no_grad():
                left.copy_(saved)

    @torch.no_grad()
    def subtract(self, correction: LowRankUpdate | Tensor) -> None:
        """Take ``correction``, whose rows are in the row space of the second factor, from the first one for good."""
        assert isinstance(correction, LowRankUpdate), "step() refuses dense corrections"
        left, right, scale = self._factors
        exact = correction.right.dtype
        inverse = torch.linalg.pinv(whole(right).to(correction.right.device, exact))
        rest = whole(left).to(inverse) - correction.left @ (correction.right.T @ inverse) / scale
        left.copy_(sharded_like(rest.to(left.device, left.dtype), left.detach()))

    def rounding_loss(self) -> float:
        """Return zero: the factors are the change as it is stored, nothing is kept beside them."""
        return 0.0


def adapted_layers(module: nn.Module) -> dict[str, tuple[str, LoraLayer]]:
    """Return the LoRA layers of a module, by the name of every weight that is part of one.

    Returns:
        By the names of a base weight and of each of its factors: the name of the base weight, and the layer.
    """
    found: dict[str, tuple[str, LoraLayer]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
            prefix = f"{name}." if name else ""
            base = f"{prefix}base_layer.weight"
            parts = ("base_layer.", "lora_A.", "lora_B.", "lora_embedding_A.", "lora_embedding_B.")
            found |= {prefix + part: (base, layer) for part, _ in layer.named_parameters() if part.startswith(parts)}
    return found
