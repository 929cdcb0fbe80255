r"""A sum of low-rank updates in factored form, :math:`\Delta = Q_A C Q_B^\top`, with its spectrum always available."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.devices import chosen
from prune_lightning.spectral.triplets import Triplets, fp64, triplets_above
from prune_lightning.types import LowRankUpdate

_NOTHING_NEW = 1e-14  # a direction with a smaller share of a block counts as part of the basis
_ORTHOGONAL = 1e-12


@dataclass(frozen=True)
class Split:
    """A block of ``b`` vectors as a basis sees it.

    Args:
        within: Coordinates in the basis, shape ``(rank, b)``.
        beyond: Coordinates in the further directions, ``(b, b)``.
        fresh: The further directions, orthonormal to each other and to the basis, ``(size, b)``.
        new: Which of them count, ``(b,)``; the others are rounding errors.
    """

    within: Tensor
    beyond: Tensor
    fresh: Tensor
    new: Tensor

    @property
    def coordinates(self) -> Tensor:
        """Coordinates in the basis and in all further directions, zero where these do not count."""
        return torch.cat([self.within, torch.where(self.new[:, None], self.beyond, 0.0)])


class Basis:
    """Orthonormal columns, fp64, extended by the directions that a block of vectors adds to their span.

    Args:
        size: Length of the vectors.
        device: Their device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._store = torch.zeros(16, size, dtype=torch.float64, device=device)  # rows, so that growing is appending
        self._rank = 0

    def __len__(self) -> int:
        return self._rank

    @property
    def vectors(self) -> Tensor:
        """The basis, shape ``(size, rank)``."""
        return self._store[: self._rank].T

    def to(self, device: torch.device) -> Basis:
        """Move to a device, in place."""
        self._store = self._store.to(device)
        return self

    def split(self, block: Tensor) -> Split:
        """Split a block into its part in the span of the basis and the rest; the basis does not change yet.

        The block is projected twice, the second time as unit vectors, so that the basis is orthonormal to working
        precision even for nearly collinear blocks.

        Args:
            block: Vectors ``(size, b)``, fp64.
        """
        known = self.vectors
        within = known.T @ block
        fresh, outer = torch.linalg.qr(block - known @ within)
        again = known.T @ fresh
        within = within + again @ outer
        fresh, inner = torch.linalg.qr(fresh - known @ again)
        beyond = inner @ outer
        new = torch.linalg.vector_norm(beyond, dim=1) > _NOTHING_NEW * torch.linalg.matrix_norm(block)
        return Split(within, beyond, fresh, new)

    def extend(self, split: Split, count: int) -> Tensor:
        """Extend the basis by the new directions of a block, and return the block's coordinates.

        Args:
            split: Of the block, by this basis.
            count: The number of its new directions.

        Returns:
            Coordinates ``(new rank, b)``.
        """
        new = chosen(split.new, count)
        self._append(split.fresh[:, new])
        return torch.cat([split.within, split.beyond[new]])

    def load(self, vectors: Tensor) -> None:
        """Replace the basis by known vectors ``(size, rank)``."""
        self._rank = 0
        self._append(vectors.to(self._store))

    def _append(self, vectors: Tensor) -> None:
        rank = self._rank + vectors.shape[1]
        if rank > len(self._store):
            store = self._store.new_zeros(max(rank, 2 * len(self._store)), self._store.shape[1])
            store[: self._rank] = self._store[: self._rank]
            self._store = store
        self._store[self._rank : rank] = vectors.T
        self._rank = rank

    def reorthogonalise(self) -> Tensor | None:
        """Make the columns orthonormal again if rounding errors have accumulated.

        Returns:
            ``R`` with ``old = new R``, or ``None`` if nothing changed.
        """
        vectors = self.vectors
        error = (vectors.T @ vectors - torch.eye(self._rank).to(vectors)).abs().max() if self._rank else 0.0
        if float(error) <= _ORTHOGONAL:
            return None
        straight, factor = torch.linalg.qr(vectors)
        self._store[: self._rank] = straight.T
        return factor


class FactoredMatrix:
    r"""A matrix :math:`Q_A C Q_B^\top` with orthonormal :math:`Q_A, Q_B` and a small core :math:`C`, fp64.

    Appending an update of rank :math:`b` to a matrix of rank :math:`k` costs :math:`O((m+n)kb)`, and singular values
    are computed from the core in :math:`O(k^3)` at most.

    Args:
        rows: :math:`m`.
        columns: :math:`n`.
        device: Device of the factors.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.left, self.right = Basis(rows, device), Basis(columns, device)
        self.core = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self._checked_at = 32
        self._norm: float | None = 0.0

    def to(self, device: torch.device) -> FactoredMatrix:
        """Move to a device, in place."""
        self.left.to(device)
        self.right.to(device)
        self.core = self.core.to(device)
        return self

    @property
    def rank(self) -> int:
        """Number of directions, an upper bound of the rank."""
        return max(len(self.left), len(self.right))

    def append(self, update: LowRankUpdate) -> None:
        """Add an update; directions that are in the bases already do not extend them.

        How many do is read together with the norm of the result: the host waits for the device once.
        """
        left, right = fp64(update.left), fp64(update.right)
        length = torch.linalg.vector_norm(left, dim=0)
        unit = left / torch.where(length > 0, length, 1.0)
        of_left, of_right = self.left.split(unit), self.right.split(right * length)
        grown = self._grown(of_left.coordinates, of_right.coordinates)
        norm = torch.linalg.matrix_norm(grown)
        counts = [split.new.sum().to(norm) for split in (of_left, of_right)]
        num_left, num_right, self._norm = torch.stack([*counts, norm]).tolist()
        within = self.left.extend(of_left, int(num_left)), self.right.extend(of_right, int(num_right))
        # The core has only the directions that count; as a rule these are all.
        self.core = grown if grown.shape == (len(self.left), len(self.right)) else self._grown(*within)
        if self.rank >= self._checked_at:
            self._checked_at *= 2
            self._reorthogonalise()

    def _grown(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the core plus a product of coordinates, in bases that these may have extended."""
        core = self.core.new_zeros(len(left), len(right))
        core[: self.core.shape[0], : self.core.shape[1]] = self.core
        return core.addmm_(left, right.T)

    def norm(self) -> float:
        """Return the Frobenius norm."""
        if self._norm is None:
            self._norm = float(torch.linalg.matrix_norm(self.core))
        return self._norm

    def _reorthogonalise(self) -> None:
        for_left, for_right = self.left.reorthogonalise(), self.right.reorthogonalise()
        self.core = self.core if for_left is None else for_left @ self.core
        self.core = self.core if for_right is None else self.core @ for_right.T
        self._norm = None

    def triplets_above(self, threshold: float) -> Triplets:
        """Return the singular triplets above a threshold; see :func:`prune_lightning.spectral.triplets_above`."""
        bound = self.norm() * (1 + torch.finfo(torch.float64).eps * max(1, self.rank) ** 2)
        inner = triplets_above(self.core, threshold, bound)
        left, right = self.left.vectors @ inner.left, self.right.vectors @ inner.right
        return Triplets(left, inner.sigma, right, inner.largest, inner.path)

    def singular_values(self) -> Tensor:
        """Return the singular values of the core, descending; the others are zero."""
        return torch.linalg.svdvals(self.core)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the three factors, and the rank at which the bases are checked next."""
        left, right = (
            self.left.vectors.clone(),
            self.right.vectors.clone(),
        )  # without the reserved space
        return {"left": left, "core": self.core, "right": right, "checked_at": torch.tensor(self._checked_at)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a :meth:`state_dict`, bit for bit."""
        self.left.load(state["left"])
        self.right.load(state["right"])
        self.core, self._checked_at = state["core"].to(self.core, copy=True), int(state["checked_at"])
        self._norm = None

    def dense(self) -> Tensor:
        """Return the matrix, fp64."""
        return (self.left.vectors @ self.core) @ self.right.vectors.T
