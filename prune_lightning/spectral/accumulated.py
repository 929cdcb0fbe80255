"""The accumulated change of one weight matrix: a dense master copy, and its factors while the rank is low."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prune_lightning.spectral.diagnostics import singular_values
from prune_lightning.spectral.factored import FactoredMatrix
from prune_lightning.spectral.triplets import Triplets, fp64, triplets_above
from prune_lightning.types import DenseUpdate, LowRankUpdate, MatrixUpdate

_FACTORED_UP_TO = 0.75  # of the smaller side; above it the dense path is as fast and needs no more memory


class AccumulatedChange:
    r"""A sum of updates, :math:`\Delta = \sum_i A_i B_i^\top`, dense and, while its rank is low, in factors.

    The dense master has the weight's precision, fp32 at least. The factors, fp64, are updated lazily, when a spectrum
    is needed, and dropped once the rank reaches three quarters of the smaller side or a dense change is added. Their
    bits depend only on the updates, not on when they are used.

    Args:
        like: A matrix with the shape, device and memory layout to use, ``out_features x in_features``.

    Attributes:
        master: :math:`\Delta`.
    """

    def __init__(self, like: Tensor) -> None:
        self.master = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        self._factored: FactoredMatrix | None = FactoredMatrix(like.shape[0], like.shape[1], fp64(like[:0]).device)
        self._pending: list[LowRankUpdate] = []

    def to(self, device: torch.device) -> AccumulatedChange:
        """Move to a device, in place."""
        self.master = self.master.to(device)
        exact = fp64(self.master[:0]).device
        self._pending = [update.to(device) for update in self._pending]
        self._factored = None if self._factored is None else self._factored.to(exact)
        return self

    @torch.no_grad()
    def add(self, update: MatrixUpdate) -> None:
        """Add an update; a dense one ends the factored form."""
        update.add_to(self.master)
        if isinstance(update, DenseUpdate):
            self._make_dense()
        elif self._factored is not None:
            self._pending.append(update)
            rank = self._factored.rank + sum(pending.left.shape[1] for pending in self._pending)
            limit = _FACTORED_UP_TO * min(self.master.shape)
            if rank > limit and (known := self.factored()) is not None and known.rank > limit:
                self._make_dense()

    @torch.no_grad()
    def subtract(self, change: LowRankUpdate | Tensor) -> None:
        """Subtract a change, e.g. a restraint's correction; a dense one ends the factored form."""
        if isinstance(change, Tensor):
            self.master.sub_(change.to(self.master))
            self._make_dense()
        else:
            self.write(self.master, correction=change)
            if (factored := self.factored()) is not None:
                factored.append(LowRankUpdate(-change.left, change.right))

    def _make_dense(self) -> None:
        self._factored, self._pending = None, []

    def factored(self) -> FactoredMatrix | None:
        """Return the updated factors, or ``None`` if they were dropped."""
        if self._factored is not None:
            for update in self._pending:
                self._factored.append(update)
            self._pending = []
        return self._factored

    def state_dict(self) -> dict[str, Tensor]:
        """Return the master and the factors."""
        state = {"master": self.master}
        if (factored := self.factored()) is not None:
            state |= {f"factored.{name}": tensor for name, tensor in factored.state_dict().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a :meth:`state_dict`, bit for bit."""
        self.master.copy_(state["master"])
        self._make_dense()
        if "factored.core" in state:
            self._factored = FactoredMatrix(self.master.shape[0], self.master.shape[1], fp64(self.master[:0]).device)
            self._factored.load_state_dict({name.removeprefix("factored."): t for name, t in state.items()})

    @torch.no_grad()
    def triplets_above(self, threshold: float) -> Triplets:
        """Return the singular triplets above a threshold, from the factors if there are any."""
        factored = self.factored()
        return triplets_above(self.master, threshold) if factored is None else factored.triplets_above(threshold)

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """Return all ``min(m, n)`` singular values, descending, fp64."""
        factored = self.factored()
        if factored is None:
            return singular_values(self.master)
        found = factored.singular_values()
        return torch.nn.functional.pad(found, (0, min(self.master.shape) - len(found)))

    @torch.no_grad()
    def write(self, out: Tensor, base: Tensor | None = None, correction: MatrixUpdate | None = None) -> None:
        r"""Write :math:`W_0 + \Delta - A B^\top`, computed in the master's precision and rounded once.

        Entries that the correction does not change keep their bits. If the correction cancels so much that the master's
        rounding would matter, the difference is computed from the factors.

        Args:
            out: The output, of any floating dtype.
            base: :math:`W_0`; ``None`` for zero.
            correction: :math:`A B^\top`, or a dense one; ``None`` for zero.
        """
        target = out if out.dtype == self.master.dtype else torch.empty_like(self.master)
        rest = self._rest_after_cancellation(correction) if isinstance(correction, LowRankUpdate) else None
        if rest is not None:
            target.copy_(rest if base is None else rest.add_(base))
            correction = None
        elif base is not None:
            torch.add(self.master, base, out=target)
        elif target is not self.master:
            target.copy_(self.master)
        if isinstance(correction, DenseUpdate):
            target.sub_(correction.matrix.to(target))
        elif correction is not None:
            target.addmm_(correction.left.to(target), correction.right.to(target).T, alpha=-1)
        if target is not out:
            out.copy_(target)

    def _rest_after_cancellation(self, correction: LowRankUpdate) -> Tensor | None:
        factored = self.factored()
        if factored is None or correction.norm() < 0.9 * factored.norm():
            return None
        left, right = factored.left.vectors, factored.right.vectors
        from_left, from_right = left.T @ fp64(correction.left), right.T @ fp64(correction.right)
        if not (_spans(left, from_left, correction.left) and _spans(right, from_right, correction.right)):
            return None  # what is left has directions that the change has not, as under a subspace filter
        core = factored.core - from_left @ from_right.T
        eps = torch.finfo(self.master.dtype).eps
        if eps * factored.norm() <= eps**0.75 * float(torch.linalg.matrix_norm(core)):
            return None
        return (left @ core).to(self.master) @ right.to(self.master).T


def _spans(basis: Tensor, coordinates: Tensor, vectors: Tensor) -> bool:
    """Whether vectors lie in the span of a basis, up to fp64's rounding."""
    outside = torch.linalg.matrix_norm(fp64(vectors) - basis @ coordinates)
    return bool(outside <= 1e-12 * torch.linalg.matrix_norm(coordinates))
