"""MEND's network, which transforms the gradient of an edit, token by token, into an update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from prune_lightning.errors import UserError
from prune_lightning.methods.standardisation import RunningMoments
from prune_lightning.ranges import Count


@dataclass(frozen=True)
class NetworkShape:
    r"""Size and initial values of the network.

    Args:
        rank: :math:`R`, the width of a block's bottleneck; capped at ``in_features + out_features``.
        blocks: Residual blocks.
        initial_rate: :math:`\alpha` of every matrix before training. Negative: along the gradient, downhill.
    """

    rank: Count = 1920
    blocks: Count = 2
    initial_rate: float = -1e-4

    def __post_init__(self) -> None:
        for name in ("rank", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"MEND's `{name}` is expected to be a whole number of at least 1, but got {value!r}")


class GradientNet(nn.Module):
    r"""The network of all matrices of one shape.

    .. math:: f_j(z; m) = z + \max\bigl(0,\; s_{jm} \odot (U_j V_j z + b_j) + h_{jm}\bigr), \qquad
              z = \Bigl[\tfrac{u - \mu_u}{\sigma_u};\; \tfrac{\delta - \mu_\delta}{\sigma_\delta}\Bigr]

    (Mitchell et al. 2022, eqs. 3, 4 with the scale and shift of sec. 3.1.) ``U = 0``, ``s = 1``, ``h = b = 0`` at the
    start, so that the untrained network returns the normalised gradient.

    Args:
        in_features: Width of :math:`u`.
        out_features: Width of :math:`\delta`.
        members: Matrices that share the network.
        shape: Size and initial values.
    """

    def __init__(self, in_features: int, out_features: int, members: int, shape: NetworkShape) -> None:
        super().__init__()
        self.split = [in_features, out_features]
        width = in_features + out_features
        rank, blocks = min(shape.rank, width), shape.blocks
        self.input_moments, self.gradient_moments = RunningMoments(in_features), RunningMoments(out_features)
        self.up = nn.Parameter(torch.zeros(blocks, width, rank))
        self.down = nn.Parameter(torch.randn(blocks, rank, width))
        self.bias = nn.Parameter(torch.zeros(blocks, width))
        self.scale = nn.Parameter(torch.ones(blocks, members, width))
        self.shift = nn.Parameter(torch.zeros(blocks, members, width))

    def forward(self, member: int, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\tilde u, \tilde\delta`; in training mode the rows are first added to the running moments.

        Args:
            member: Number of the matrix.
            inputs: :math:`u`, shape ``(n, in_features)``.
            gradients: :math:`\delta`, shape ``(n, out_features)``.
        """
        if self.training:
            self.input_moments.update(inputs)
            self.gradient_moments.update(gradients)
        z = torch.cat([self.input_moments(inputs), self.gradient_moments(gradients)], dim=-1)
        for up, down, bias, scale, shift in zip(
            self.up, self.down, self.bias, self.scale[:, member], self.shift[:, member], strict=True
        ):
            # clamp's derivative at zero is one. That is needed, since initially every argument is exactly zero.
            z = z + (scale * (z @ down.T @ up.T + bias) + shift).clamp(min=0)
        inputs, gradients = z.split(self.split, dim=-1)
        return inputs, gradients


class MENDNetwork(nn.Module):
    r"""All networks of a model, one per shape of matrix, and a rate :math:`\alpha` per matrix.

    .. math:: \Delta W_\ell = \alpha_\ell \sum_t \tilde\delta_t \tilde u_t^\top

    Args:
        matrices: ``(out_features, in_features)`` of each edited matrix, by the name of its weight.
        shape: Size and initial values.
    """

    def __init__(self, matrices: Mapping[str, tuple[int, int]], shape: NetworkShape) -> None:
        super().__init__()
        self.matrices, self.shape = dict(matrices), shape
        self._place: dict[str, tuple[str, int]] = {}
        self.nets = nn.ModuleDict()
        by_shape = sorted(self.matrices.items(), key=lambda item: item[1])
        for (out_features, in_features), group in groupby(by_shape, key=lambda item: item[1]):
            key, names = f"{in_features}_to_{out_features}", [name for name, _ in group]
            self.nets[key] = GradientNet(in_features, out_features, len(names), shape)
            self._place |= {name: (key, member) for member, name in enumerate(names)}
        self.rates = nn.Parameter(torch.full((len(self.matrices),), float(shape.initial_rate)))

    def forward(self, name: str, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\tilde u` and :math:`\alpha\tilde\delta` of one matrix in the network's precision.

        Args:
            name: Name of the weight.
            inputs: :math:`u`, the matrix's inputs at ``n`` tokens, shape ``(n, in_features)``.
            gradients: :math:`\delta`, the loss's gradient by its outputs, shape ``(n, out_features)``.
        """
        key, member = self._place[name]
        inputs, gradients = self.nets[key](member, inputs.to(self.rates), gradients.to(self.rates))
        return inputs, self.rates[list(self.matrices).index(name)] * gradients

    def transformations(self) -> Iterator[nn.Parameter]:
        """Yield all parameters except the rates."""
        yield from self.nets.parameters()

    def reset_moments(self) -> None:
        """Reset the running moments."""
        for module in self.modules():
            if isinstance(module, RunningMoments):
                module.reset()
