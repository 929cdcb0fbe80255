r"""Second moments of keys, :math:`C = \frac1N \sum_i k_i k_i^\top`, and solving with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prune_lightning.errors import UserError
from prune_lightning.models.hooks import record
from prune_lightning.models.language_model import LanguageModel
from prune_lightning.types import Track, untracked


class Corpus(Protocol):
    """Text that a model's statistics are taken over."""

    def texts(self) -> Iterable[str]:
        """Return the texts."""
        ...

    def __len__(self) -> int: ...


class SecondMoment:
    """One layer's second moment, symmetric ``(in_features, in_features)``, fp64, ready for solving.

    Args:
        matrix: :math:`C`.

    Raises:
        UserError: The matrix is not finite or zero.
    """

    def __init__(self, matrix: Tensor) -> None:
        if not torch.isfinite(matrix).all() or not matrix.diagonal().sum() > 0:
            raise UserError("the second moment of the keys is not finite; check the model and the statistics corpus")
        self.matrix = matrix.double()
        self._cholesky, failed = torch.linalg.cholesky_ex(self.matrix)
        self._eigen: tuple[Tensor, Tensor] | None = None
        if failed.item():
            values, vectors = torch.linalg.eigh(self.matrix)
            floor = values.max() * torch.finfo(torch.float64).eps * len(values)
            rank_zero_warn(
                f"the second moment is not positive definite ({int((values <= floor).sum())} of {len(values)} "
                "eigenvalues vanish); solving by eigenvalues. More statistics tokens, or a `ridge`, would help"
            )
            self._eigen = values.clamp_min(floor), vectors

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues, ascending, and eigenvectors; computed anew at each call."""
        return torch.linalg.eigh(self.matrix)

    def inverse(self) -> Tensor:
        r"""Return :math:`C^{-1}`."""
        return self.solve(torch.eye(len(self.matrix)).to(self.matrix))

    def solve(self, keys: Tensor) -> Tensor:
        r"""Return :math:`C^{-1} K` for keys ``(in_features, n)``."""
        if self._eigen is not None:
            values, vectors = self._eigen
            return vectors @ ((vectors.T @ keys) / values[:, None])
        return torch.cholesky_solve(keys, self._cholesky)


class SecondMoments:
    """Takes the second moments of a model's keys over a corpus, all layers in one pass.

    Args:
        corpus: The texts; ``None`` for the identity (an uncalibrated choice that some published settings make).
        max_tokens: Stop after this many tokens; ``None`` for the whole corpus.
        max_length: Longest piece of a text, in tokens.
        ridge: Added to the diagonal, in units of its mean.
        token_budget: Padded tokens per forward pass.
    """

    def __init__(
        self,
        corpus: Corpus | None,
        max_tokens: int | None = None,
        max_length: int = 1024,
        ridge: float = 0.0,
        token_budget: int = 8192,
    ) -> None:
        self.corpus, self.max_tokens, self.max_length = corpus, max_tokens, max_length
        self.ridge, self.token_budget = ridge, token_budget
        self.num_tokens = 0

    def _pieces(self, model: LanguageModel, corpus: Corpus) -> Iterator[list[int]]:
        left = self.max_tokens if self.max_tokens is not None else float("inf")
        longest = min(self.max_length, model.tokens.max_length)
        for text in corpus.texts():
            if left <= 0:
                return
            if text.strip():
                piece = model.tokens.encode(text)[: int(min(longest, left))]
                left -= len(piece)
                yield piece

    def _batches(self, pieces: Iterable[list[int]]) -> Iterator[list[list[int]]]:
        """Group pieces of similar length, a few thousand at a time."""
        stream = iter(pieces)
        while window := list(itertools.islice(stream, 2048)):
            batch: list[list[int]] = []
            for piece in sorted(window, key=len):
                if batch and (len(batch) + 1) * len(piece) > self.token_budget:
                    yield batch
                    batch = []
                batch.append(piece)
            if batch:
                yield batch

    @torch.no_grad()
    def compute(self, model: LanguageModel, layers: Sequence[int], track: Track = untracked) -> dict[int, SecondMoment]:
        """Return the second moment of the down-projection's input at each layer.

        Args:
            model: The unedited model.
            layers: Layers wanted.
            track: Watches the corpus go by.
        """
        modules = [model.rewrite_module(layer) for layer in layers]
        sizes = [module.weight.shape[0] if hasattr(module, "nf") else module.in_features for module in modules]
        sums = [torch.zeros(size, size, dtype=torch.float64, device=model.device) for size in sizes]
        if self.corpus is None:
            return {layer: SecondMoment(torch.eye(len(s)).to(s)) for layer, s in zip(layers, sums, strict=True)}
        self.num_tokens = 0
        watched = track(self._pieces(model, self.corpus), "statistics", len(self.corpus))
        for batch in self._batches(watched):
            ids, mask = model.tokens.pad(batch, model.device)
            with record(inputs=modules) as seen:
                model(ids, mask)
            for i, total in enumerate(sums):
                keys = seen.inputs[i][mask.bool()].double()
                total.addmm_(keys.T, keys)
            self.num_tokens += int(mask.sum())
        if not self.num_tokens:
            raise UserError("the statistics corpus holds no text")
        result = {}
        for layer, total in zip(layers, sums, strict=True):
            moment = total / self.num_tokens
            moment.diagonal().add_(self.ridge * moment.diagonal().mean())
            result[layer] = SecondMoment(moment)
        return result
