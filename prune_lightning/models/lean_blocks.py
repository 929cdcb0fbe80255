"""Runs blocks of the commonest kind with a backward pass written by hand, for gradients of hidden states alone.

A block of this kind normalises by the root mean square, has rotary positions and a gated MLP with SiLU: Llama, Mistral,
Qwen2, SmolLM2. The products are the model's own. What is left out is their surroundings: tokens that are padding,
copies of keys and values, gradients of cached ones, and autograd's records of some sixty operations per block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from prune_lightning.models.packed_weights import Product

_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def is_lean(block: nn.Module) -> bool:
    """Whether a block has the parts of this kind, and nothing is hooked to them.

    Whether the parts work together in the way supposed here shows in the logits, which the caller has to compare.
    """
    parts = dict(block.named_modules())
    names = {name.partition(".")[0] for name in parts if name}
    if names != _BLOCK or any("forward" in vars(p) or p._forward_hooks or p._forward_pre_hooks for p in parts.values()):
        return False
    attention, mlp = (set(dict(parts[name].named_children())) for name in ("self_attn", "mlp"))
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    return (
        attention == _ATTENTION
        and mlp == _MLP
        and all(type(parts[f"self_attn.{name}"]) is nn.Linear for name in _ATTENTION)
        and all(type(parts[f"mlp.{name}"]) is nn.Linear for name in _MLP - {"act_fn"})
        and "silu" in type(parts["mlp.act_fn"]).__name__.lower()
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(hasattr(parts["self_attn"], name) for name in ("head_dim", "scaling"))
    )


def linear_modules(block: Any) -> tuple[tuple[nn.Linear, ...], ...]:
    """Return the linear modules of a block; those of one tuple have the same input."""
    attention, mlp = block.self_attn, block.mlp
    into = attention.q_proj, attention.k_proj, attention.v_proj
    return into, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


@dataclass(frozen=True)
class Places:
    """Where the tokens that run lie in the padded rows.

    Args:
        real: Their indices into ``rows * length``, shape ``(n,)``.
        slot: Number of the token of each place, shape ``(rows, length)``; 0 for padding.
        read: Numbers of the tokens whose output is read.
    """

    real: Tensor
    slot: Tensor
    read: Tensor

    @classmethod
    def of(cls, mask: Tensor, rows: Tensor, positions: Tensor) -> Places:
        """Return them for a mask of right-padded rows, and the places that are read."""
        real = torch.nonzero(mask.flatten())[:, 0]
        slot = torch.zeros(mask.numel(), dtype=torch.long, device=mask.device)
        slot[real] = torch.arange(len(real), device=mask.device)
        read = slot[(rows * mask.shape[1] + positions).unique()]
        return cls(real, slot.view(mask.shape), read)


class LeanBlock:
    """One block, with the keys and values of earlier tokens.

    Args:
        block: The block; its weights are read at every run.
        past: Keys and values of earlier tokens, both ``(rows, heads, earlier, size)``.
        mask: What the model passes to the block: ``(rows or 1, 1, length, earlier + length)``, boolean or additive;
            ``None`` if causality is all there is to it.
        rotation: Cosine and sine of the positions, both ``(rows or 1, length, size)``.
        places: The tokens that run.
        last: Whether only the tokens that are read run beyond the attention.
        product: Returns the product of linear modules with the same input.
    """

    def __init__(
        self,
        block: Any,
        past: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        places: Places,
        last: bool,
        product: Callable[[Sequence[nn.Linear]], Product],
    ) -> None:
        self.block, self.places, self.last = block, places, last
        self._into, self._out, self._up, self._down = (product(together) for together in linear_modules(block))
        rows, length = places.slot.shape
        size = block.self_attn.head_dim
        self._size, self._rows, self._length = size, rows, length
        self.heads = block.self_attn.q_proj.out_features // size
        self.shared = block.self_attn.k_proj.out_features // size
        cos, sin = (t.expand(rows, length, size).flatten(0, 1)[places.real][:, None] for t in rotation)
        half = size // 2
        self._cos, self._sin = cos, (sin[..., :half].contiguous(), sin[..., half:].contiguous())
        before = 0 if past is None else past[0].shape[2]
        self._past = None if past is None or not before else (past[0].flatten(0, 1), past[1].flatten(0, 1))
        if mask is None:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=cos.device).tril(before)[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=cos.dtype, device=cos.device).masked_fill(
                ~mask, torch.finfo(cos.dtype).min
            )
        mask = mask.expand(rows, 1, length, before + length)[:, :, None].repeat(1, self.shared, self._groups, 1, 1)
        self._mask = mask.flatten(0, 1).flatten(1, 2)  # (rows * shared, groups * length, earlier + length)
        self._before = before

    @property
    def _groups(self) -> int:
        return self.heads // self.shared

    # -- layouts ------------------------------------------------------------------------------------------------------
    def _spread(self, packed: Tensor, heads: int) -> Tensor:
        """Return ``(n, heads * size)`` as ``(rows * shared, groups * length, size)``."""
        padded = packed[self.places.slot.flatten()].view(self._rows, self._length, self.shared, -1, self._size)
        return padded.permute(0, 2, 3, 1, 4).reshape(self._rows * self.shared, -1, self._size)

    def _gather(self, spread: Tensor) -> Tensor:
        """Return the tokens of what :meth:`_spread` returned, ``(n, heads * size)``."""
        apart = spread.view(self._rows, self.shared, -1, self._length, self._size).permute(0, 3, 1, 2, 4)
        return apart.reshape(self._rows * self._length, -1)[self.places.real]

    def _rotate(self, packed: Tensor, back: bool = False) -> Tensor:
        """Rotate ``(n, heads * size)`` to its positions, or a gradient back."""
        heads = packed.view(len(packed), -1, self._size)
        half, (low, high) = self._size // 2, self._sin
        out = heads * self._cos
        if back:
            out[..., :half].addcmul_(heads[..., half:], high)
            out[..., half:].addcmul_(heads[..., :half], low, value=-1)
        else:
            out[..., :half].addcmul_(heads[..., half:], low, value=-1)
            out[..., half:].addcmul_(heads[..., :half], high)
        return out.flatten(1)

    def _by_key(self, left: Tensor, which: int, new: Tensor) -> Tensor:
        """Return the products with earlier keys (``which`` 0) or values (1), and with the new ones, by token."""
        products = left @ new.transpose(1, 2)
        if self._past is None:
            return products
        return torch.cat([left @ self._past[which].transpose(1, 2), products], dim=-1)

    # -- forward and backward -----------------------------------------------------------------------------------------
    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the block's output for ``(n, width)`` and what :meth:`backward` needs."""
        block = self.block
        normed, scale = _norm(block.input_layernorm, hidden)
        query, key, value = self._into.forward(normed)
        query = self._spread(self._rotate(query), self.heads)
        key = self._spread(self._rotate(key), self.shared)
        value = self._spread(value, self.shared)
        scores = self._by_key(query, 0, key)
        weights = torch.add(self._mask, scores, alpha=block.self_attn.scaling).softmax(-1)
        mixed = weights[..., self._before :] @ value
        if self._past is not None:
            mixed = mixed.baddbmm_(weights[..., : self._before], self._past[1])
        mixed = self._gather(mixed)
        if self.last:
            mixed, hidden_read = mixed[self.places.read], hidden[self.places.read]
        else:
            hidden_read = hidden
        middle = self._out.forward(mixed)[0].add_(hidden_read)
        normed, second = _norm(block.post_attention_layernorm, middle)
        gate, up = self._up.forward(normed)
        active = functional.silu(gate)
        output = self._down.forward(active * up)[0].add_(middle)
        return output, (hidden, scale, query, key, value, weights, middle, second, gate, up, active)

    def backward(self, gradient: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """Return the gradient of the block's input, given that of its output."""
        block = self.block
        hidden, scale, query, key, value, weights, middle, second, gate, up, active = kept
        inner = self._down.backward(gradient)
        down = self._up.backward(torch.ops.aten.silu_backward(inner * up, gate), inner.mul_(active))
        gradient = _norm_back(block.post_attention_layernorm, middle, second, down).add_(gradient)
        mixed = self._out.backward(gradient)
        if self.last:  # the others' outputs are not read
            mixed = mixed.new_zeros(len(hidden), mixed.shape[1]).index_copy_(0, self.places.read, mixed)
            gradient = gradient.new_zeros(hidden.shape).index_copy_(0, self.places.read, gradient)
        mixed = self._padded(mixed)
        by_weight = self._by_key(mixed, 1, value)
        scores = torch.ops.aten._softmax_backward_data(by_weight, weights, -1, weights.dtype)
        scores.mul_(block.self_attn.scaling)
        later = scores[..., self._before :]
        by_query = later @ key
        if self._past is not None:
            by_query = by_query.baddbmm_(scores[..., : self._before], self._past[0])
        by_key = later.transpose(1, 2) @ query
        by_value = weights[..., self._before :].transpose(1, 2) @ mixed
        rotated = (self._rotate(self._gather(each), back=True) for each in (by_query, by_key))
        down = self._into.backward(*rotated, self._gather(by_value))
        return _norm_back(block.input_layernorm, hidden, scale, down).add_(gradient)

    def _padded(self, packed: Tensor) -> Tensor:
        """Spread a gradient, zero at padding."""
        padded = packed.new_zeros(self._rows * self._length, packed.shape[1]).index_copy_(0, self.places.real, packed)
        apart = padded.view(self._rows, self._length, self.shared, -1, self._size).permute(0, 2, 3, 1, 4)
        return apart.reshape(self._rows * self.shared, -1, self._size)


def _norm(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised states, and the factor of each; in fp32 as in ``transformers``, whatever the dtype."""
    exact = hidden.to(torch.float32)
    scale = exact.square().mean(-1, keepdim=True).add_(module.variance_epsilon).rsqrt_()
    return (exact * scale).to(hidden.dtype) * module.weight, scale


def _norm_back(module: Any, hidden: Tensor, scale: Tensor, gradient: Tensor) -> Tensor:
    exact, scaled = hidden.to(torch.float32), (gradient * module.weight).to(torch.float32)
    along = (exact * scaled).mean(-1, keepdim=True) * scale**3
    return (scaled * scale).addcmul_(exact, along, value=-1).to(hidden.dtype)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, blocks: Sequence[LeanBlock]) -> Tensor:
        ctx.blocks, ctx.kept = blocks, []
        for block in blocks:
            hidden, kept = block.forward(hidden)
            if ctx.needs_input_grad[0]:
                ctx.kept.append(kept)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        for block, kept in zip(reversed(ctx.blocks), reversed(ctx.kept), strict=True):
            gradient = block.backward(gradient, kept)
        return gradient, None


class LeanBlocks:
    """Consecutive blocks up to the last one, as a function of padded hidden states.

    Args:
        blocks: The blocks, from below.
        places: The tokens that run.
    """

    def __init__(self, blocks: Sequence[LeanBlock], places: Places) -> None:
        self.blocks, self.places = blocks, places

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the last block's output for ``(rows, length, width)``; zero where it is not read."""
        flat = hidden.flatten(0, 1)
        found: Tensor = _Run.apply(flat[self.places.real], self.blocks)  # type: ignore[no-untyped-call]
        read = self.places.real[self.places.read]
        return torch.zeros_like(flat).index_copy(0, read, found).view_as(hidden)
