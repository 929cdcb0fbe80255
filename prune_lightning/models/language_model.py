"""A causal language model with its tokenizer and its family."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_lightning.errors import UserError, near
from prune_lightning.models.adapters import refuse_adapters
from prune_lightning.models.family import ModelFamily, number_of_experts, stores_transposed
from prune_lightning.models.fast_path import FastPath, agrees
from prune_lightning.models.hooks import capture, edit_input, edit_output, few_rows
from prune_lightning.models.kept_results import KeptResults
from prune_lightning.models.prompt_memory import PromptMemory, PromptReader, Row
from prune_lightning.models.token_tree import grow, tree_inputs
from prune_lightning.models.tokenization import Tokens
from prune_lightning.sharding import is_sharded, refuse_device_map, shard, whole


class Multiply(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``factor * hidden``."""
        return self.factor * hidden


class LanguageModel(nn.Module):
    """Binds a ``transformers`` causal language model to its family and freezes it.

    Args:
        model: The model; without adapters, and not spread over devices by ``accelerate``. It is put into evaluation
            mode and its parameters are frozen.
        tokenizer: Its fast tokenizer.
        family: Module paths of the architecture; found by ``model_type`` if not given.

    Attributes:
        memory: What changes its answers besides the weights; ``None`` for nothing.
        reader: Where the prompts of a forward pass end, for a memory.
        kept: Results that hold as long as the model stays as it is.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: ModelFamily | None = None
    ) -> None:
        super().__init__()
        refuse_adapters(model)
        refuse_device_map(model)
        self.model: Any = model.eval().requires_grad_(False)
        self.tokens = Tokens(tokenizer, getattr(model.config.get_text_config(), "max_position_embeddings", None))
        self.family = family or ModelFamily.of(model.config)
        self.fast_path = FastPath(type(model).__name__, partial(is_sharded, model))
        self.memory: PromptMemory | None = None
        self.reader, self.kept = PromptReader(), KeptResults()
        self._joins: dict[int, bool] = {}

    @property
    def config(self) -> Any:
        """Configuration of the text model, which is a part of a multimodal model's."""
        return self.model.config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among processes, which then have to run the same passes together."""
        return is_sharded(self.model)

    def shard(self, device_type: str) -> None:
        """Divide the weights among all processes; each block is gathered while it runs (FSDP2)."""
        shard(self.model, map(self.block, range(self.num_layers)), device_type)

    def _module(self, template: str, layer: int) -> nn.Module:
        if not 0 <= layer < self.num_layers:
            raise UserError(f"layer {layer} is outside the model's layers 0 to {self.num_layers - 1}")
        try:
            module: nn.Module = self.model.get_submodule(template.format(layer))
        except AttributeError as error:
            name = self.family.model_type
            experts = "; it is a mixture of experts" if number_of_experts(self.model.config) else ""
            raise UserError(f"configs/model/family/{name}.yaml does not fit this model: {error}{experts}") from error
        return module

    def block(self, layer: int) -> nn.Module:
        """Return a transformer block."""
        return self._module(self.family.block, layer)

    @cached_property
    def block_returns_tuple(self) -> bool:
        """Whether the blocks return their hidden states in a tuple; determined by running one token."""
        seen: list[bool] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(isinstance(output, tuple))

        handle = self.block(0).register_forward_hook(look)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            with torch.no_grad():
                self(token, torch.ones_like(token))
        finally:
            handle.remove()
        return seen[0]

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the model's ``forward`` takes ``position_ids``; other models compute positions from the mask."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def joins(self, layer: int) -> bool:
        """Whether a shift of the down-projection's output shifts the block's output as :meth:`after_mlp` predicts.

        Tested once per layer by a shift on a few tokens. Fast paths rely on it: without a shift, a factor or a norm
        that is missing in the family's YAML would go unnoticed.
        """
        if layer not in self._joins:
            module, after = self.rewrite_module(layer), self.after_mlp(layer)
            ids = torch.arange(1, 4, device=self.device)[None] % int(self.config.vocab_size)
            modules = [module, self.block(layer)]

            def outputs() -> tuple[Tensor, Tensor]:
                with capture(outputs=modules, rows=1) as seen:
                    self(ids, torch.ones_like(ids))
                return seen.outputs[0], seen.outputs[1]

            with torch.no_grad(), self.frozen_mode():
                written, block = outputs()
                shift = written * (block.norm() / written.norm())
                with edit_output(module, lambda output: output + shift, rows=1):
                    _, shifted = outputs()
                self._joins[layer] = agrees(shifted, block + after(written + shift) - after(written))
        return self._joins[layer]

    @cached_property
    def tree_depth(self) -> int:
        """Longest sequence in rows of :mod:`~prune_lightning.models.token_tree`; 0 if the model does not support them.

        Tested by running branches that differ in their first tokens both as a tree and separately. This detects
        attention that ignores the mask, or positions that differ from ``position_ids``. The mask does not include
        sliding windows, so they limit the length.
        """
        size = int(self.config.vocab_size)
        sequences = [[token % size for token in branch] for branch in ((1, 2, 3, 4), (1, 5, 6, 7), (8, 9, 3, 4))]
        rows = grow(sequences)
        inputs = tree_inputs(rows, self.tokens.pad_id, self.model.dtype, self.device)
        with torch.no_grad(), self.frozen_mode():
            plain = torch.tensor(sequences, device=self.device)
            expected = self(plain, torch.ones_like(plain)).double()
            try:
                tree = self(**inputs)[0].double()
            except (IndexError, RuntimeError, TypeError, ValueError):  # does not support positions or such a mask
                return 0
        error = max(float((tree[path] - expected[i]).abs().max()) for i, path in rows[0].paths.items())
        rounding = max(1000 * torch.finfo(torch.float32).eps, 8 * torch.finfo(self.model.dtype).eps)
        if not error <= rounding * float(expected.abs().max()):
            return 0
        return min(self.tokens.max_length, getattr(self.config, "sliding_window", None) or self.tokens.max_length)

    def mlp(self, layer: int) -> nn.Module | None:
        """Return a block's MLP; ``None`` if it is not a separate module."""
        path = self.family.mlp
        return None if path is None or path == self.family.block else self._module(path, layer)

    def mlp_linears(self, layer: int) -> dict[str, nn.Module]:
        """Return the linear modules of a block's MLP by the qualified name of their weight."""
        paths = [f"{self.family.mlp or self.family.block}.{name}" for name in self.family.mlp_weights]
        return {path.format(layer) + ".weight": self._module(path, layer) for path in paths}

    def after_mlp(self, layer: int) -> nn.Module:
        """Return the norm between a block's MLP and the residual stream; the identity if there is none.

        If the architecture multiplies the MLP's output by a constant :attr:`multiplier`, return that multiplication.
        """
        if self.family.after_mlp:
            return self._module(self.family.after_mlp, layer)
        return nn.Identity() if self.multiplier == 1 else Multiply(self.multiplier)

    @property
    def multiplier(self) -> float:
        """Factor of the MLP's output before the residual addition."""
        return float(getattr(self.config, self.family.multiplier)) if self.family.multiplier else 1.0

    def activation(self, layer: int) -> nn.Module:
        """Return the activation function of a block's MLP, whose input is the pre-activations."""
        if self.family.activation is None:
            raise UserError(f"configs/model/family/{self.family.model_type}.yaml does not say where `activation` is")
        return self._module(self.family.activation, layer)

    def rewrite_module(self, layer: int) -> Any:
        """Return a block's MLP down-projection, the module whose weight is edited."""
        return self._module(self.family.rewrite, layer)

    def key_size(self, layer: int) -> int:
        """Return the width of the keys of ``layer``, the input of its down-projection."""
        module = self.rewrite_module(layer)
        return int(module.weight.shape[0 if stores_transposed(module) else 1])

    def rewrite_output(self, layer: int, keys: Tensor) -> Tensor:
        """Return the present output of the down-projection of ``layer`` for keys ``(..., in_features)``, fp32 at least.

        Computed outside the model, from its weight in full precision.
        """
        module = self.rewrite_module(layer)
        weight = whole(module.weight.detach())
        output = keys @ (weight if stores_transposed(module) else weight.T).to(keys)
        return output if module.bias is None else output + whole(module.bias.detach()).to(keys)

    def rewrite_name(self, layer: int) -> str:
        """Return the qualified name of the edited weight of ``layer`` in the ``transformers`` model."""
        return self.family.rewrite.format(layer) + ".weight"

    def modules_named(self, layer: int, names: Sequence[str]) -> dict[str, nn.Module]:
        """Return the modules of block ``layer`` whose last name is one of ``names``, by their path in the model.

        Raises:
            UserError: No module of the block has one of the names.
        """
        prefix = self.family.block.format(layer)
        inside = {path: module for path, module in self.block(layer).named_modules() if path}
        own = {path: path.rpartition(".")[2] for path in inside}
        for name in names:
            if name not in own.values():
                raise UserError(f"no module {name!r} in {prefix}: {near(name, sorted(set(own.values())))}")
        return {f"{prefix}.{path}": inside[path] for path in inside if own[path] in names}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """Return logits, shape ``(rows, length, vocabulary)``; inputs are right-padded, ``kwargs`` are the model's."""
        kwargs = {"use_cache": False, **kwargs}
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
        return logits

    def logits_at(
        self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, positions: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the logits at chosen positions; the LM head runs only there.

        Args:
            input_ids: Right-padded ids, shape ``(rows, length)``.
            attention_mask: One where ``input_ids`` is not padding.
            rows: Row of each place, shape ``(n,)``.
            positions: Position of each place, shape ``(n,)``.
            kwargs: For the model's ``forward``.

        Returns:
            Logits, shape ``(n, vocabulary)``.
        """
        head = self.model.get_output_embeddings()
        # The quick head returns a view, which FSDP warns of.
        quick = nullcontext() if self.is_sharded else few_rows(head)
        at_places = edit_input(head, lambda hidden: hidden[rows, positions].unsqueeze(1))
        with self.reader.only_at(rows, positions), at_places, quick:
            return self(input_ids, attention_mask, **kwargs).squeeze(1)

    def asked(self, rows: Sequence[Row]) -> list[Row]:
        """Return what is run in place of rows of tokens: the same rows, unless a memory changes prompts."""
        return [row if self.memory is None else self.memory.asked(row) for row in rows]

    @contextmanager
    def prompts(self, lengths: Sequence[int]) -> Iterator[None]:
        """Say, for the forward passes inside the block, how many tokens of each row are its prompt."""
        self.reader.lengths = torch.tensor(lengths)
        try:
            yield
        finally:
            self.reader.lengths = None

    @contextmanager
    def frozen_mode(self) -> Iterator[None]:
        """Run with dropout off inside the block, then restore the mode.

        A Trainer's ``precision`` sets PyTorch's default dtype during a step. Inside the block it is fp32, the dtype of
        an edit's new tensors.
        """
        training, default = self.model.training, torch.get_default_dtype()
        self.model.eval()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            self.model.train(training)
