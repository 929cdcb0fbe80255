r"""Kronecker factors of a loss's curvature: second moments of a matrix's inputs and of the gradients of its outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prune_lightning.devices import to_device
from prune_lightning.errors import UserError
from prune_lightning.models.batching import by_length, within_logits
from prune_lightning.models.hooks import capture, edit_output
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.models.statistics import SecondMoments
from prune_lightning.models.statistics_store import StatisticsStore

Factors = tuple[Tensor, Tensor]
r""":math:`S` of the outputs' gradients, ``(out, out)``, and :math:`A` of the inputs, ``(in, in)``, fp64."""


class CurvatureStatistics(Protocol):
    """Where the curvature of some matrices comes from."""

    def factors(self, module: nn.Module, names: Sequence[str]) -> Mapping[str, Factors]:
        """Return the factors of weights by their name in ``module``, under its present weights."""
        ...


@contextmanager
def probed(modules: Sequence[nn.Module], rows: int | None = None) -> Iterator[list[Tensor]]:
    """Add a zero with a gradient to the output of each module inside the block, and return these zeros.

    The gradient of a loss with respect to a zero is that with respect to the output, also if the model is frozen.
    """
    zeros: list[Tensor] = [torch.empty(0)] * len(modules)

    def add(index: int) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            zeros[index] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[index]

        return change

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(edit_output(module, add(index), rows))
        yield zeros


def summed_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a causal language model of ``transformers``, summed over the tokens that are predicted.

    Its own loss is their mean. Label ``t`` is predicted at position ``t - 1``, so the first label of a row does not
    count, and neither does -100.
    """
    if "labels" not in batch:
        raise UserError("the curvature needs batches with `labels`, or a `loss` of your own")
    mean: Tensor = module(**batch).loss
    return mean * (batch["labels"][..., 1:] != -100).sum()


class BatchCurvature:
    """The curvature of any module's loss over given batches, for any training.

    Args:
        batches: What the capability to preserve is measured on; iterated once. All positions count: leave out padding.
        loss: ``loss(module, batch)``, a sum over tokens: with means, short batches would count as much as long ones. By
            default :func:`summed_loss`, that of a causal language model.

    Raises:
        UserError: There is no batch, or a named weight belongs to a module that the loss does not run.
    """

    def __init__(self, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor] | None = None) -> None:
        self.batches = batches
        self.loss = loss or summed_loss

    def factors(self, module: nn.Module, names: Sequence[str]) -> dict[str, Factors]:
        """Run the module in evaluation mode on all batches; gradients of its parameters are not touched."""
        owners = [module.get_submodule(name.rpartition(".")[0]) for name in names]
        device = next(module.parameters()).device
        sums: list[list[Tensor]] = [[] for _ in names]
        count = 0
        training = [part for part in module.modules() if part.training]
        module.eval()
        try:
            for batch in self.batches:
                with torch.enable_grad(), capture(owners, stop=False) as seen, probed(owners) as zeros:
                    loss = self.loss(module, to_device(batch, device))
                    if len(seen.inputs) < len(owners):
                        missing = next(name for i, name in enumerate(names) if i not in seen.inputs)
                        raise UserError(f"the loss does not run the module of {missing}: name others with `parameters`")
                    gradients = torch.autograd.grad(loss, zeros, allow_unused=True)
                for i, gradient in enumerate(gradients):
                    inputs = seen.inputs[i].detach().flatten(0, -2).double()
                    of_outputs = torch.zeros_like(zeros[i]) if gradient is None else gradient
                    of_outputs = of_outputs.flatten(0, -2).double()
                    products = [of_outputs.T @ of_outputs, inputs.T @ inputs]
                    sums[i] = products if not sums[i] else [a + b for a, b in zip(sums[i], products, strict=True)]
                count += 1
        finally:
            for part in training:
                part.training = True
        if not count:
            raise UserError("the statistics of the curvature need at least one batch")
        return {name: (of[0], of[1]) for name, of in zip(names, sums, strict=True)}


class CorpusCurvature:
    r"""The curvature of a language model's loss over the corpus of its second moments, for editing methods.

    :math:`A` is the second moment that the locate-then-edit methods use, from the same cache. :math:`S` takes one
    backward pass over the first texts, with the true next tokens as labels and the loss summed over tokens; it is
    stored in the same cache.

    Args:
        second_moments: Where :math:`A` comes from; its corpus and its cache serve :math:`S`, too.
        max_texts: Number of texts for :math:`S`.

    Raises:
        UserError: A weight is no down-projection, or there is no corpus.
    """

    def __init__(self, second_moments: SecondMoments, max_texts: int = 1000) -> None:
        self.second_moments, self.max_texts = second_moments, max_texts

    def factors(self, module: nn.Module, names: Sequence[str]) -> dict[str, Factors]:
        """Return the factors of down-projections of a :class:`~.language_model.LanguageModel`."""
        if not isinstance(module, LanguageModel) or self.second_moments.corpus is None:
            raise UserError(
                "CorpusCurvature needs a LanguageModel and second moments with a corpus; see BatchCurvature"
            )
        known = {module.rewrite_name(layer): layer for layer in range(module.num_layers)}
        if other := [name for name in names if name not in known]:
            raise UserError(f"there are statistics of down-projections only, not of {other[0]}")
        layers = [known[name] for name in names]
        inputs = self.second_moments.compute(module, layers)
        outputs = self._outputs(module, layers)
        return {name: (outputs[layer], inputs[layer].matrix) for name, layer in zip(names, layers, strict=True)}

    def _outputs(self, model: LanguageModel, layers: Sequence[int]) -> dict[int, Tensor]:
        moments = self.second_moments
        manifest = {**moments.manifest(model), "of": "gradients of the outputs", "max_texts": self.max_texts}
        store = StatisticsStore(moments.cache, manifest) if moments.cache else None
        if store and (found := store.load(layers, model.device)) is not None:
            return found
        result = self.take(model, layers)
        if store:  # rounded as in the store, so that a run from the cache gives the same results
            result = {layer: moment.float().double() for layer, moment in result.items()}
            store.save(result, {"texts": self.max_texts})
        return result

    def take(self, model: LanguageModel, layers: Sequence[int]) -> dict[int, Tensor]:
        r"""Run the model forwards and backwards on the texts and return :math:`S` by layer."""
        longest = min(self.second_moments.max_length, model.tokens.max_length)
        texts = itertools.islice(iter(self.second_moments.resolved(model, layers).texts()), self.max_texts)
        pieces = [model.tokens.encode(text)[:longest] for text in texts if text.strip()]
        modules = [model.rewrite_module(layer) for layer in layers]
        sums: dict[int, Tensor] = {}
        tokens = sum(map(len, pieces))
        budget = within_logits(self.second_moments.token_budget, int(model.config.vocab_size))
        for group in by_length([len(piece) for piece in pieces], budget):
            ids, mask = model.tokens.pad([pieces[i] for i in group], model.device)
            with model.frozen_mode(), torch.enable_grad(), probed(modules, rows=len(ids)) as zeros:
                logits = model(ids, mask)
                log_p = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                of_labels = log_p.gather(-1, ids[:, 1:, None])[..., 0]
                gradients = torch.autograd.grad(-(of_labels * mask[:, 1:]).sum(), zeros)
            for layer, gradient in zip(layers, gradients, strict=True):
                rows = gradient[mask.bool()].double()
                sums[layer] = rows.T @ rows / tokens + sums.get(layer, 0.0)
        if not sums:
            raise UserError("the statistics corpus holds no text")
        return sums
