"""Counts work and memory of a model's passes by running them on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from prune_lightning.costs import Shape, Work
from prune_lightning.models.family import ModelFamily, stores_transposed
from prune_lightning.models.hooks import capture, edit_input, edit_output, pass_through
from prune_lightning.models.lean_blocks import is_lean, linear_modules
from prune_lightning.models.packed_weights import packed_bytes


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
    """A causal language model on the meta device.

    Args:
        config: Its configuration.
        dtype: Dtype of its weights.
        family: Contents of the family's YAML; ``None`` for the shipped one of the architecture.
        on_cpu: Whether it is to run on a CPU.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        family: Mapping[str, Any] | None = None,
        on_cpu: bool = True,
    ) -> None:
        self.on_cpu = on_cpu
        self.family = ModelFamily.of(config) if family is None else ModelFamily.from_entries(family)
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

    def edited_shape(self, layer: int) -> Shape:
        """Return ``(out_features, in_features)`` of the edited matrix of a layer."""
        return _shape(self.model.get_submodule(self.family.rewrite.format(layer)))

    def mlp_shapes(self, layer: int) -> dict[str, Shape]:
        """Return the shapes of all linear modules of a layer's MLP, by name."""
        mlp = self.model.get_submodule((self.family.mlp or self.family.block).format(layer))
        return {name: _shape(mlp.get_submodule(name)) for name in self.family.mlp_weights}

    def named_shapes(self, layer: int, names: Sequence[str]) -> list[Shape]:
        """Return the shapes of the modules of a block whose last name is one of ``names``."""
        modules = self.block(layer).named_modules()
        return [_shape(module) for path, module in modules if path.rpartition(".")[2] in names]

    @property
    def weight_size(self) -> int:
        """Bytes of a weight."""
        return torch.finfo(self.dtype).bits // 8

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def positions(self) -> int | None:
        """Longest input of the model."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def kv_width(self) -> int:
        """Width of a layer's keys for one token."""
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return int((getattr(self.config, "num_key_value_heads", None) or heads) * size)

    def packed_bytes(self, layer: int) -> int:
        """Return the bytes of packed copies of the weights above a block; 0 if they are multiplied as they are."""
        above = [self.block(index) for index in range(layer + 1, self.num_layers)]
        if not (self.on_cpu and above and all(map(is_lean, above))):
            return 0
        return packed_bytes([module for block in above for together in linear_modules(block) for module in together])

    def _forward(self, rows: int, length: int, places: int) -> Tensor:
        """Run the model with the LM head at ``places`` positions only."""
        head = self.model.get_output_embeddings()
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        # A four-dimensional mask is used unchanged; a padding mask would be read, but it has no values here.
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
            layer: The block whose output is shifted.
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


def _shape(module: Any) -> Shape:
    rows, columns = module.weight.shape
    return (columns, rows) if stores_transposed(module) else (rows, columns)
