"""The singular triplets of a matrix above a threshold, by the cheapest method that suffices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lightning.errors import UserError

_SMALL = 256  # up to this many columns a full decomposition is faster than a search for a few triplets
_BLOCK = 8
_CONVERGED = 1e-12  # residual of a wanted triplet in units of the threshold, which is the scale of the result;
_ROUNDING = 2e-15  # smallest attainable residual in units of the largest singular value
_LANCZOS_FROM = 1e-5  # threshold in units of the norm; below that only a full SVD is accurate


class NonFiniteChange(UserError):
    """A change of weights holds NaN or infinity and cannot be factorised."""


@dataclass(frozen=True)
class Triplets:
    r"""The part :math:`U_J \Sigma_J V_J^\top` of a matrix with singular values above a threshold, fp64.

    Args:
        left: :math:`U_J`, shape ``(rows, j)``.
        sigma: Descending, shape ``(j,)``.
        right: :math:`V_J`, shape ``(columns, j)``.
        largest: Largest singular value of the matrix; under ``certificate`` an upper bound.
        path: The method used: ``certificate`` (a norm), ``lanczos``, ``gram`` or ``svd``.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor
    largest: float
    path: str

    @property
    def transposed(self) -> Triplets:
        """The triplets of the transposed matrix."""
        return Triplets(self.right, self.sigma, self.left, self.largest, self.path)


def fp64(tensor: Tensor) -> Tensor:
    """Return a tensor in fp64, on the CPU if its device does not support that (Apple's GPUs)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def norm_bound(matrix: Tensor) -> float:
    """Return a rigorous upper bound of the Frobenius norm, at most 0.1 % above it, from one read of the matrix.

    The squares are summed in the matrix's own precision (fp32 at least) along each row and in fp64 over the rows; a
    bound of the rounding error is added. NaN if the matrix holds NaN or infinity.
    """
    contiguous = matrix if matrix.stride(-1) == 1 else matrix.T
    rows = torch.linalg.vector_norm(contiguous, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    norm = float(torch.linalg.vector_norm(fp64(rows)))
    if not norm < float("inf"):  # which squares can be that the matrix's own precision does not hold
        return float(torch.linalg.vector_norm(fp64(matrix))) if torch.isfinite(matrix).all() else float("nan")
    return norm * (1 + min(1e-3, torch.finfo(rows.dtype).eps * contiguous.shape[1]))


def triplets_above(matrix: Tensor, threshold: float, norm: float | None = None) -> Triplets:
    r"""Return the singular triplets with :math:`\sigma >` ``threshold``.

    The first of these that suffices is used: a Frobenius norm not above the threshold, which proves that there are
    none; block Lanczos bidiagonalisation for a few triplets, with a residual test on each and on the next one below;
    the eigenvectors of :math:`M^\top M` if squaring loses no accuracy; a full SVD.

    Args:
        matrix: Shape ``(rows, columns)``, any floating dtype; everything but the norm is computed in fp64.
        threshold: Positive.
        norm: An upper bound of the Frobenius norm, if one is known; see :func:`norm_bound`.

    Raises:
        NonFiniteChange: The matrix holds NaN or infinity.
        UserError: The threshold is not positive.
    """
    if not threshold > 0:
        raise UserError(f"the reference singular value is expected to be positive, but got {threshold}")
    norm = norm_bound(matrix) if norm is None else norm
    if not norm < float("inf"):
        raise NonFiniteChange("the change of the weights holds NaN or infinity; it cannot be restrained")
    if norm <= threshold:
        none = fp64(matrix.new_zeros(0))
        rows, columns = matrix.shape
        return Triplets(none.new_zeros(rows, 0), none, none.new_zeros(columns, 0), norm, "certificate")
    if matrix.shape[0] < matrix.shape[1]:
        return _triplets_of_tall(matrix.T, threshold, norm).transposed
    return _triplets_of_tall(matrix, threshold, norm)


def _triplets_of_tall(matrix: Tensor, threshold: float, norm: float) -> Triplets:
    # The Gram matrix has a relative error of eps * (norm / threshold)^2 near the threshold.
    gram_from = (torch.finfo(torch.float64).eps / (1e-11 if matrix.dtype == torch.float64 else 1e-6)) ** 0.5
    matrix = fp64(matrix)
    found: tuple[Tensor | None, Tensor, Tensor] | None = None
    path = "lanczos"
    if matrix.shape[1] > _SMALL and threshold >= _LANCZOS_FROM * norm:
        found = _by_lanczos(matrix, threshold)
    if found is None and threshold >= gram_from * norm:
        path = "gram"
        values, right = torch.linalg.eigh(matrix.T @ matrix)
        sigma, right = values.flip(0).clamp_min(0).sqrt(), right.flip(1)
        found = None, sigma, right
    if found is None:
        path = "svd"
        left, sigma, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
        found = left, sigma, right_transposed.T
    left, sigma, right = found
    above, largest = torch.stack([(sigma > threshold).sum().to(sigma), sigma[0]]).tolist()
    count = int(above)
    left = matrix @ (right[:, :count] / sigma[:count]) if left is None else left[:, :count]
    return Triplets(left, sigma[:count], right[:, :count], largest, path)


def _by_lanczos(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Search until no value above the threshold is left; ``None`` if that takes too long.

    The triplets found are deflated, and the search is repeated on the rest from other random vectors until it finds
    nothing. So a value with a multiplicity above the block size is not missed. The search is complete when the largest
    Ritz value below the threshold has converged to a thirtieth of its distance from it.
    """

    def all_found(sigma: Tensor, residual: Tensor) -> bool:
        sigma, residual = torch.stack([sigma, residual]).cpu()  # one wait for the device
        wanted = int((sigma > threshold).sum())
        if wanted == len(sigma):
            return False
        settled = bool(residual[wanted] <= 0.03 * (threshold - sigma[wanted]))
        accurate = residual[:wanted] <= _CONVERGED * threshold + _ROUNDING * sigma[0]
        return settled and bool(accurate.all())

    rounds: list[tuple[Tensor, Tensor, Tensor]] = []
    largest_below = matrix.new_zeros(1)
    while True:
        found = bidiagonalise(matrix, all_found, seed=len(rounds))
        if found is None:
            return None
        left, sigma, right = found
        count = int((sigma > threshold).sum())
        largest_below = sigma[count : count + 1]
        if not count:
            break
        rounds.append((left[:, :count], sigma[:count], right[:, :count]))
        matrix = matrix - (left[:, :count] * sigma[:count]) @ right[:, :count].T
    if not rounds:
        return matrix[:, :0], largest_below, matrix.T[:, :0]
    lefts, sigmas, rights = zip(*rounds, strict=True)
    sigma, order = torch.cat(sigmas).sort(descending=True)
    return torch.cat(lefts, 1)[:, order], sigma, torch.cat(rights, 1)[:, order]


def bidiagonalise(
    matrix: Tensor, converged: Callable[[Tensor, Tensor], bool], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor] | None:
    r"""Golub-Kahan block Lanczos with full re-orthogonalisation: :math:`M V = U B`, :math:`B` block bidiagonal.

    Args:
        matrix: Shape ``(rows, columns)`` with ``rows >= columns``, fp64.
        converged: Called with the Ritz values, descending, and the residuals :math:`\|M^\top u - \sigma v\|`; returns
            whether to stop. (:math:`M v = \sigma u` holds exactly.)
        seed: Seed of the random starting vectors.

    Returns:
        Left vectors, values and right vectors, or ``None`` if it does not converge within a quarter of the columns.
    """
    columns = matrix.shape[1]
    limit, block = columns // 4 // _BLOCK * _BLOCK, _BLOCK
    # A local generator gives the same result on every call and rank, and leaves the global random state alone.
    noise = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, block, generator=noise, dtype=torch.float64).to(matrix.device)
    right = torch.linalg.qr(start)[0]
    left, corner = torch.linalg.qr(matrix @ right)
    bidiagonal, check_at = corner, block
    while right.shape[1] + block <= limit:
        newest = matrix.T @ left[:, -block:] - right[:, -block:] @ corner.T
        fresh, link = _orthonormal(newest, right, noise)
        if right.shape[1] >= check_at:
            inner_left, sigma, inner_right = torch.linalg.svd(bidiagonal)
            residual = torch.linalg.vector_norm(link @ inner_left[-block:], dim=0)
            if converged(sigma, residual):
                return left @ inner_left, sigma, right @ inner_right.T
            check_at = right.shape[1] + max(block, right.shape[1] // 8)
        product = matrix @ fresh - left[:, -block:] @ link.T
        new_left, corner = _orthonormal(product, left, noise)
        size = len(bidiagonal)
        grown = bidiagonal.new_zeros(size + block, size + block)
        grown[:size, :size], grown[-block:, -block:] = bidiagonal, corner
        grown[size - block : size, -block:] = link.T
        left, right, bidiagonal = torch.cat([left, new_left], 1), torch.cat([right, fresh], 1), grown
    return None


def _orthonormal(block: Tensor, basis: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``Q, R`` with ``Q`` orthonormal, orthogonal to ``basis``, and ``Q R`` = the rest of ``block``.

    Where a column vanishes (the Krylov space is exhausted), ``Q`` gets a random direction and ``R`` a zero row. So the
    search continues and finds values with a multiplicity above the block size.
    """
    rest = block - basis @ (basis.T @ block)
    rest = rest - basis @ (basis.T @ rest)
    scale = torch.linalg.matrix_norm(block)
    vectors, factor = torch.linalg.qr(rest)
    weak = factor.diagonal().abs() <= 1e-14 * scale
    if weak.any():
        random = torch.randn(len(block), int(weak.sum()), generator=noise, dtype=torch.float64).to(block.device)
        vectors[:, weak] = random
        for _ in range(2):
            vectors = torch.linalg.qr(vectors - basis @ (basis.T @ vectors))[0]
        factor = vectors.T @ rest
    return vectors, factor
