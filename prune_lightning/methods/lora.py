"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn

from prune_lightning.costs import Cost, Shapes, StreamShape
from prune_lightning.methods.base import EditingModule
from prune_lightning.methods.costs import training_cost
from prune_lightning.methods.cpu_dropout import draw_on_the_cpu
from prune_lightning.methods.target_batch import TargetBatch
from prune_lightning.methods.tuning_problem import logits_above
from prune_lightning.models.adapters import refuse_adapters
from prune_lightning.models.family import stores_transposed
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.ranges import Count, Positive, ShareBelowOne, Whole
from prune_lightning.types import EditRequest, LowRankUpdate
from prune_lightning.value_types import check_values

ADAPTER = "edit"


class LoRA(EditingModule):
    r"""Train :math:`\Delta = \frac{\alpha}{r} B A` on the cross-entropy of the targets and merge it into the weights.

    The ``peft`` adapters are in the model only while an edit is computed: their factors become the update, and the
    model's own modules are restored. They are trained in fp32 at least, with their dropout on and the model's off. By
    default each edit has new adapters; ``keep=true`` continues to train the same ones, as EasyEdit does, and writes the
    difference. There is no early stopping, as published. Every process of a distributed run computes the same update.

    Args:
        language_model: The model to edit.
        layers: Blocks that get adapters; ``None`` for all.
        target_modules: Names of the modules in these blocks that get one, e.g. ``q_proj``; ``None`` for the MLP's
            down-projection.
        rank: :math:`r`.
        alpha: :math:`\alpha`.
        dropout: Dropout of the input of :math:`A` in training.
        steps: Passes over the requests of an edit.
        learning_rate: Adam's learning rate.
        batch_size: Requests per step of Adam.
        keep: Train one set of adapters throughout the stream.
        seed: Seed of the initial :math:`A` and of the dropout, on every device alike; combined with the number of
            earlier edits.
        fast: Run only the blocks with adapters, and those above. The plain path computes the same from the whole model.
        kwargs: See :class:`~.base.EditingModule`.

    Raises:
        UserError: A number out of range, or a name that no module of an edited block has.
    """

    def __init__(
        self,
        *,
        language_model: LanguageModel,
        layers: Sequence[Whole] | None = None,
        target_modules: Sequence[str] | None = None,
        rank: Count = 8,
        alpha: Positive = 32,
        dropout: ShareBelowOne = 0.1,
        steps: Count = 70,
        learning_rate: Positive = 5e-3,
        batch_size: Count = 1,
        keep: bool = False,
        seed: int = 0,
        fast: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(language_model, range(language_model.num_layers) if layers is None else layers, **kwargs)
        check_values("method", Count, rank=rank, steps=steps, batch_size=batch_size)
        check_values("method", Positive, learning_rate=learning_rate, alpha=alpha)
        check_values("method", ShareBelowOne, dropout=dropout)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.steps, self.learning_rate, self.batch_size = steps, learning_rate, batch_size
        self.target_modules, self.keep, self.seed, self.fast = tuple(target_modules or ()), keep, seed, fast
        self._modules_by_name = self._find_modules()
        self._kept: dict[str, Tensor] = {}  # parameters of the adapters under `keep`
        self._candidate: dict[str, Tensor] = {}
        self._merged: dict[str, LowRankUpdate] = {}  # their merged updates
        self._new: dict[str, LowRankUpdate] = {}
        self._remembered: dict[str, Tensor] = {}

    @classmethod
    def cost(
        cls,
        model: Shapes,
        stream: StreamShape,
        *,
        layers: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = None,
        rank: int = 8,
        steps: int = 70,
        batch_size: int = 1,
        **options: Any,
    ) -> Cost:
        """Return the costs; one set of adapters is trained per step of the stream."""
        blocks = list(range(model.num_layers)) if layers is None else list(layers)
        shapes = [
            shape
            for layer in blocks
            for shape in (model.named_shapes(layer, target_modules) if target_modules else [model.edited_shape(layer)])
        ]
        return training_cost(
            model,
            stream,
            layers=blocks,
            matrices=shapes,
            rank=rank / stream.batch,
            trained=float(sum(rank * (m + n) for m, n in shapes) * max(model.weight_size, 4)),
            steps=steps,
            batch_size=batch_size,
        )

    # -- what is edited -------------------------------------------------------------------------------------------
    def edited_modules(self) -> Mapping[str, nn.Module]:
        """Return the modules that get an adapter, by the name of their weight."""
        return self._modules_by_name

    def _find_modules(self) -> Mapping[str, nn.Module]:
        if not self.target_modules:
            return super().edited_modules()
        found: dict[str, nn.Module] = {}
        for layer in self.layers:
            inside = self.language_model.modules_named(layer, self.target_modules)
            found |= {f"{path}.weight": module for path, module in inside.items()}
        return found

    @property
    def builds_on_earlier(self) -> str | None:
        """``keep``."""
        return "keep=true builds on the adapters of earlier edits" if self.keep else None

    # -- one edit -------------------------------------------------------------------------------------------------
    def compute_update(self, requests: Sequence[EditRequest]) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
        """Return the merged adapters; under ``keep``, their difference to what was written before."""
        chunks = [requests[i : i + self.batch_size] for i in range(0, len(requests), self.batch_size)]
        with self._own_randomness(), self.provisional():
            for name, update in self._merged.items():
                self.edited_matrices()[name].add_provisionally(negative(update))
            with self._adapters(self.steps * len(chunks)) as tuner:
                self._load(self._kept)
                losses = self._train(tuner, chunks)
                self._new = {name: self.merged(self.adapted(name)) for name in self.edited_matrices()}
                self._candidate = {name: p.detach().clone() for name, p in self._trained()}
        updates = {
            name: LowRankUpdate.sum([update, negative(self._merged[name])]) if self._merged else update
            for name, update in self._new.items()
        }
        return updates, [{"steps": self.steps, "losses": of_request} for of_request in losses.T.tolist()]

    def observe(self, requests: Sequence[EditRequest]) -> Mapping[str, Tensor]:
        """Return, under ``keep``, the adapters that were just written and their merged updates."""
        if not self.keep:
            return {}
        written = {f"{side} {name}": getattr(u, side) for name, u in self._new.items() for side in ("left", "right")}
        return {f"adapter {name}": tensor for name, tensor in self._candidate.items()} | written

    def remember(self, observed: Mapping[str, Tensor]) -> None:
        """Continue with these adapters."""
        kinds: dict[str, dict[str, Tensor]] = {"adapter": {}, "left": {}, "right": {}}
        for name, tensor in observed.items():
            kind, _, rest = name.partition(" ")
            kinds[kind][rest] = tensor
        self._kept = kinds["adapter"]
        self._merged = {name: LowRankUpdate(left, kinds["right"][name]) for name, left in kinds["left"].items()}
        self._remembered = dict(observed)

    def memory(self) -> Mapping[str, Tensor]:
        """Return the kept adapters."""
        return self._remembered

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Continue with these adapters."""
        self.remember(memory)

    def forget(self) -> None:
        """Start with new adapters."""
        self._kept, self._merged, self._remembered = {}, {}, {}

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Seed the generators by the edit's number, alike on every process, and restore them after the block."""
        device = self.language_model.device
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            torch.manual_seed(self.seed + self.run.num_requests)
            yield

    @contextmanager
    def _adapters(self, total_steps: int) -> Iterator[LoraModel]:
        """Wrap the edited modules in adapters inside the block, then restore the model's own."""
        self.edited_matrices()
        refuse_adapters(self.language_model.model)  # unloading ours would remove the user's, too
        tuner = self.inject(self.language_model.model, total_steps)
        try:
            for name in self.edited_matrices():
                draw_on_the_cpu(self.adapted(name).lora_dropout)
            cast_adapter_dtype(self.language_model.model, ADAPTER)
            self.language_model.model.eval()  # new layers begin with their dropout on
            yield tuner
        finally:
            tuner.unload()

    def adapted(self, name: str) -> Any:
        """Return ``peft``'s layer that wraps an edited module."""
        return self.language_model.model.get_submodule(name.removesuffix(".weight"))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        # By name: peft's cast from single precision makes AdaLoRA's divisor, a constant, require a gradient.
        return [(n, p) for n, p in self.language_model.model.named_parameters() if LoraModel.prefix in n]

    @torch.no_grad()
    def _load(self, kept: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained() if kept else ():
            parameter.copy_(kept[name])

    def _train(self, tuner: LoraModel, chunks: Sequence[Sequence[EditRequest]]) -> Tensor:
        """Return the losses before each step, one row per pass, one column per request."""
        batches = [TargetBatch(self.language_model, chunk, "target") for chunk in chunks]
        model, lowest = self.language_model, self.layers[0]
        forwards = [logits_above(model, lowest, batch, "adapters", self.fast) for batch in batches]
        for name in self.edited_matrices():
            self.adapted(name).lora_dropout.train()  # of this edit's adapters; the model stays in evaluation mode
        optimizer = torch.optim.Adam([parameter for _, parameter in self._trained()], lr=self.learning_rate)
        history, step = [], 0
        for _ in range(self.steps):
            losses = []
            for batch, forward in zip(batches, forwards, strict=True):
                with torch.enable_grad():
                    each = batch.losses(forward())
                    optimizer.zero_grad()
                    (each.mean() + self.penalty()).backward()
                optimizer.step()
                step += 1
                self.stepped(tuner, step)
                losses.append(each.detach())
            history.append(torch.cat(losses))
        return torch.stack(history)

    # -- hooks for other kinds of adapters ------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """Return the configuration that all kinds of adapters share."""
        transposed = any(stores_transposed(module) for module in self.edited_modules().values())
        return {
            "target_modules": [name.removesuffix(".weight") for name in self.edited_modules()],
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "fan_in_fan_out": transposed,
        }

    def inject(self, model: nn.Module, total_steps: int) -> LoraModel:
        """Add adapters, which will be trained for ``total_steps``, to ``model``."""
        return LoraModel(model, {ADAPTER: LoraConfig(r=self.rank, **self.settings())}, ADAPTER)

    def merged(self, module: Any) -> LowRankUpdate:
        r"""Return :math:`\frac{\alpha}{r} B A` of one of ``peft``'s layers."""
        left, right = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight.T
        return LowRankUpdate(left.detach() * module.scaling[ADAPTER], right.detach().clone())

    def penalty(self) -> Tensor | float:
        """Return the term to add to the loss."""
        return 0.0

    def stepped(self, tuner: LoraModel, step: int) -> None:
        """Called after each step of Adam, while gradients are still there."""


def negative(update: LowRankUpdate) -> LowRankUpdate:
    r"""Return :math:`-A B^\top`."""
    return LowRankUpdate(-update.left, update.right)
