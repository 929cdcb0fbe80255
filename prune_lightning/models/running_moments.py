"""Running sums of key products: blockwise, in fp64, divided among processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from prune_lightning.distributed import all_reduce, rank, world_size
from prune_lightning.models.hooks import capture
from prune_lightning.models.language_model import LanguageModel

_BLOCK = 512


class RunningMoments:
    r"""Upper triangles, in blocks, of :math:`\sum_i k_i k_i^\top`, one per layer, and the same for half of the tokens.

    The products of a batch are computed in the keys' precision, fp32 at least, and summed in fp64. In a distributed run
    every process adds its share of the batches, but counts all of them.

    Args:
        sizes: Width of the keys of each layer.
        device: Device of the sums.
        computing: Device of the keys, and by which the processes communicate.

    Attributes:
        tokens: Number of tokens so far.
        texts: Number of texts so far, from which an interrupted pass continues.
        convergence: The largest relative change of a layer's moment since half of the tokens; set by :meth:`finish`.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, computing: torch.device | None = None) -> None:
        self._computing = computing or device
        self.sums = [torch.zeros(n, n, dtype=torch.float64, device=device) for n in sizes]
        self.half: list[Tensor] = []
        self.tokens, self.half_tokens, self.texts = 0, 0, 0
        self.convergence = float("nan")

    def count(self, tokens: int) -> None:
        """Count a batch of any process; call it before :meth:`add`."""
        if self.tokens >= 2 * max(self.half_tokens, 1):
            self.half, self.half_tokens = [total.clone() for total in self.sums], self.tokens
        self.tokens += tokens

    def add(self, keys: Sequence[Tensor]) -> None:
        """Add a batch.

        Args:
            keys: Per layer, shape ``(tokens, in_features)``.
        """
        for total, of_layer in zip(self.sums, keys, strict=True):
            exact = of_layer if of_layer.dtype == torch.float64 else of_layer.float()
            for start in range(0, len(total), _BLOCK):  # upper triangle only, by symmetry
                total[start : start + _BLOCK, start:] += (exact[:, start : start + _BLOCK].T @ exact[:, start:]).to(
                    total.device
                )

    def add_batches(
        self, model: LanguageModel, modules: list[nn.Module], batches: Sequence[Sequence[list[int]]]
    ) -> Iterator[int]:
        """Run a model on batches of token rows, add this process's share, and yield the tokens of each batch.

        The processes of a sharded model need one another in every pass, so all run the same number of passes.

        Args:
            model: The model.
            modules: Per layer, the module whose inputs are the keys.
            batches: The same on every process.
        """
        mine, size = rank(), world_size()
        for number, batch in enumerate(batches):
            self.count(tokens := sum(map(len, batch)))
            if number % size == mine:
                ids, mask = model.tokens.pad(batch, model.device)
                with capture(inputs=modules, rows=len(ids)) as seen:
                    model(ids, mask)
                self.add([seen.inputs[i][mask.bool()] for i in range(len(modules))])
            yield tokens
        if model.is_sharded and 0 < len(batches) % size <= mine:
            model(*model.tokens.pad(batches[0], model.device))

    def gather(self) -> None:
        """Reduce all sums to rank 0; the others continue from zero."""
        tensors = [*self.sums, *self.half]
        self._reduce(tensors)
        if rank():
            for tensor in tensors:
                tensor.zero_()

    def _reduce(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            there = tensor.to(self._computing)
            all_reduce([there])
            if there is not tensor:
                tensor.copy_(there)

    def finish(self) -> list[Tensor]:
        """Convert the sums in place to the second moments and return them on every process."""
        self._reduce([*self.sums, *self.half])
        if self.half:
            changes = [
                float((now / self.tokens).sub_(then, alpha=1 / self.half_tokens).norm() / now.norm())
                for now, then in zip(self.sums, self.half, strict=True)
            ]
            self.convergence = max(changes) * self.tokens
        for total in self.sums:
            for start in range(0, len(total), _BLOCK):  # blocks on the diagonal are complete
                end = start + _BLOCK
                total[end:, start:end] = total[start:end, end:].T
            total /= self.tokens
        return self.sums
