"""Work and memory of a model's passes, counted by running them on the meta device: shapes only, no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from prune_lightning.models.family import ModelFamily, stores_transposed
from prune_lightning.models.hooks import capture, edit_input, edit_output, pass_through


@dataclass(frozen=True)
class Work:
    """What a computation does.

    Args:
        flops: Floating-point operations, a multiplication and an addition counted as two.
        moved: Bytes that its operations read and write.
        operations: Calls of kernels.
        saved: Bytes that are kept for the backward pass, weights not counted.
    """

    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    saved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            self.operations + other.operations,
            max(self.saved, other.saved),
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times, self.operations * times, self.saved)


class Counter(TorchDispatchMode):
    """Counts operations inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.operations = 0.0, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it; a view is free."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            self.moved += sum(leaf.nbytes for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))
            if func._overloadpacket in flop_registry:
                self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class ShapeModel:
    """A causal language model without numbers.

    Args:
        config: Its configuration.
        dtype: Dtype of its weights.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self.family = ModelFamily.of(config)
        self.dtype, self.config = dtype, config.get_text_config()
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self.num_layers = int(self.config.num_hidden_layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers, tied ones once."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    def block(self, layer: int) -> nn.Module:
        """Return a transformer block."""
        block: nn.Module = self.model.get_submodule(self.family.block.format(layer))
        return block

    def edited_shape(self, layer: int) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of the edited matrix of a layer."""
        module = self.model.get_submodule(self.family.rewrite.format(layer))
        rows, columns = module.weight.shape
        return (columns, rows) if stores_transposed(module) else (rows, columns)

    def _forward(self, rows: int, length: int, places: int) -> Tensor:
        """Run the model; the LM head sees ``places`` positions only."""
        head = self.model.get_output_embeddings()
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        # A mask of four dimensions is taken as it is; a padding mask would be looked at, and there is nothing to see.
        mask = torch.zeros(rows, 1, length, length, dtype=self.dtype, device="meta")
        with edit_input(head, lambda hidden: hidden.flatten(0, 1)[:places].unsqueeze(0)):
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.to(torch.promote_types(self.dtype, torch.float32)).log_softmax(-1)

    @torch.no_grad()
    def forward(self, rows: int, length: int, places: int) -> Work:
        """Count a whole forward pass."""
        with Counter() as count:
            self._forward(rows, length, places)
        return Work(count.flops, count.moved, count.operations)

    @torch.no_grad()
    def forward_until(self, layer: int, rows: int, length: int) -> Work:
        """Count a forward pass that ends above a block."""
        with Counter() as count, capture(outputs=[self.block(layer)]):
            self._forward(rows, length, 1)
        return Work(count.flops, count.moved, count.operations)

    def step(self, layer: int, rows: int, length: int, places: int) -> Work:
        """Count one step of the value optimisation: the blocks above ``layer`` forwards and backwards.

        Args:
            layer: The shift enters behind this block.
            rows: Token rows.
            length: Tokens from the subject's last one on.
            places: Positions whose logits are read.
        """
        weights = {p.untyped_storage()._cdata for p in self.model.parameters()}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        shift = torch.zeros(rows, length, self.config.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
        below: Sequence[nn.Module] = [self.block(index) for index in range(layer)]
        in_tuple = self._returns_tuple()
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            pass_through(below, in_tuple),
            edit_output(self.block(layer), lambda _: shift * 1),
            Counter() as count,
        ):
            loss = self._forward(rows, length, places).sum()
            torch.autograd.grad(loss, [shift])
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        return Work(count.flops, count.moved, count.operations, kept)

    def _returns_tuple(self) -> bool:
        seen: list[bool] = []
        handle = self.block(0).register_forward_hook(
            lambda module, args, output: seen.append(isinstance(output, tuple))
        )
        try:
            with torch.no_grad():
                self._forward(1, 1, 1)
        finally:
            handle.remove()
        return seen[0]
