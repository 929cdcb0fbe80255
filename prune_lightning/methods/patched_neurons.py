"""Logits as a function of the neurons at the last position, for the attribution of neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from prune_lightning.errors import UserError, one_of
from prune_lightning.models.cached_forward import CachedForward
from prune_lightning.models.hooks import capture, edit_input
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count


@dataclass(frozen=True)
class AttributionOptions:
    """How neurons are attributed; the defaults are the paper's.

    Args:
        steps: Points of the Riemann sum, :math:`m`.
        site: ``key``, the input of the down-projection, which is the neurons' activation; or ``pre_activation``, the
            input of the activation function (of the gate, where there is one), as in the public code for GPT and Llama.
        token_budget: Padded tokens, over all points and layers, that run together.
        layers_together: Layers attributed in one pass where the budget allows. Weights are then read less often, but
            all rows pass through the blocks between the lowest and the highest layer.
        fast: Run only what depends on the patched neurons. The plain path computes the same from the whole model.
    """

    steps: Count = 20
    site: str = "key"
    token_budget: Count = 4096
    layers_together: Count = 4
    fast: bool = True

    def __post_init__(self) -> None:
        one_of("site", self.site, ("key", "pre_activation"))
        for name in ("steps", "token_budget", "layers_together"):
            if getattr(self, name) < 1:
                raise UserError(f"attribution: `{name}` is expected to be at least 1, but got {getattr(self, name)}")

    def module(self, model: LanguageModel, layer: int) -> nn.Module:
        """Return the module whose input is attributed."""
        return model.rewrite_module(layer) if self.site == "key" else model.activation(layer)


class PatchedNeurons(Protocol):
    """Logits at the last positions as a function of the neurons there."""

    def logits(self, neurons: Mapping[int, Tensor]) -> Tensor:
        """Return the logits with the neurons of one layer replaced, for each of some layers.

        Args:
            neurons: Per layer, ascending, what replaces its neurons, shape ``(rows, width)``.

        Returns:
            Logits, shape ``(layers * rows, vocabulary)``, the rows of a layer together.
        """
        ...


def _patch(rows: Tensor, positions: Tensor, neurons: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces an activation ``(all rows, length, width)`` at some positions by ``neurons``."""

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value[rows, positions] = neurons.to(value)
        return value

    return change


class WholePatched:
    """The plain path: run the whole model over the whole prompt."""

    def __init__(self, model: LanguageModel, options: AttributionOptions, ids: Tensor, mask: Tensor) -> None:
        self.model, self.options, self.ids, self.mask = model, options, ids, mask

    def logits(self, neurons: Mapping[int, Tensor]) -> Tensor:
        """Return the logits."""
        rows, last = torch.arange(len(self.ids), device=self.ids.device), self.mask.sum(1) - 1
        parts = []
        for layer, values in neurons.items():
            with edit_input(self.options.module(self.model, layer), _patch(rows, last, values), len(rows)):
                parts.append(self.model.logits_at(self.ids, self.mask, rows, last))
        return torch.cat(parts)


class UpperPatched:
    """The fast path: run one token per row, from the lowest patched block on.

    Attention is causal and only the last position is patched. Everything before it, and the block's input at it, come
    from one pass over the prompts that serves all layers and points.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: AttributionOptions,
        forward: CachedForward,
        mlp_input: dict[int, Tensor],
        rows: Tensor,
    ) -> None:
        self.model, self.options = model, options
        self.forward, self.mlp_input, self.rows = forward, mlp_input, rows

    def logits(self, neurons: Mapping[int, Tensor]) -> Tensor:
        """Return the logits."""
        (lowest, values), *higher = neurons.items()
        forward, count = self.forward.behind(lowest), len(self.rows)
        shift = self._shift(lowest, values, forward.mlp_output[self.rows])
        forward.select(self.rows.repeat(len(neurons)))
        hidden = torch.cat([forward.hidden[:count] + shift, forward.hidden[count:]])
        rows = torch.arange(len(hidden), device=hidden.device)
        offsets = torch.zeros_like(rows)
        with ExitStack() as patches:
            for i, (layer, others) in enumerate(higher, start=1):
                own = slice(i * count, (i + 1) * count)
                change = _patch(rows[own], offsets[own], others)
                module = self.options.module(self.model, layer)
                patches.enter_context(edit_input(module, change, len(rows)))
            return forward.logits_at(hidden, rows, offsets)

    def _shift(self, layer: int, neurons: Tensor, unpatched: Tensor) -> Tensor:
        """Return the change of the block's output by patched neurons, ``(rows, 1, width)``."""
        after_mlp, rewrite = self.model.after_mlp(layer), self.model.rewrite_module(layer)
        if self.options.site == "key":
            output = rewrite(neurons[:, None].to(unpatched))
        else:
            change = edit_input(self.options.module(self.model, layer), lambda value: neurons[:, None].to(value))
            with change, capture(outputs=[rewrite]) as seen:
                mlp = self.model.mlp(layer)
                if mlp is None:
                    raise ValueError("the MLP is not a separate module")
                mlp(self.mlp_input[layer][self.rows, None])
            output = seen.outputs[0]
        shift: Tensor = after_mlp(output) - after_mlp(unpatched[:, None])
        return shift
