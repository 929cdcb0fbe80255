from __future__ import annotations

import math

import pytest
import torch

from prune_lightning.errors import UserError
from prune_lightning.spectral import Logarithm, condition_number, restrain, sigma_max


def matrix(sigma: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64))
    return left @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right.T


def dense_prune(delta: torch.Tensor, base: float, reference: float, guard: bool = True) -> torch.Tensor:
    """PRUNE as the paper writes it: full SVD, every value mapped one by one."""
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    mapped = []
    for value in sigma.tolist():
        law = value if value <= reference else math.log(value, base) - math.log(reference, base) + reference
        mapped.append(min(law, value) if guard else law)
    return left @ torch.diag(torch.tensor(mapped, dtype=delta.dtype)) @ right


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("base", [1.1, 1.5, math.e])
@pytest.mark.parametrize("sigma", [[9.0, 5.0, 2.0, 0.1], [300.0, 4.0, 4.0, 3.9], [1e4, 1e-8], [1e9, 5.0, 1.0]])
def test_restrain_equals_dense_svd(shape, base, sigma):
    delta = matrix(sigma, *shape)
    ours = restrain(delta, Logarithm(base), 4.0)
    theirs = dense_prune(delta, base, 4.0)
    # the largest value is known to 1e-16 of itself, and the error of its direction acts on the whole matrix
    assert float((ours.delta - theirs).norm()) < 1e-10 * float(theirs.norm()) + 1e-15 * sigma[0]
    assert (
        ours.num_restrained == sum(value > 4.0 for value in sigma if value != 4.0 or value > 4.0 + 1e-12)
        or 4.0 in sigma
    )


def test_restrain_leaves_small_changes_alone_as_the_same_object():
    delta = matrix([3.0, 1.0], 6, 8)
    assert restrain(delta, Logarithm(1.2), 4.0).delta is delta
    below = matrix([3.0, 3.0, 3.0], 6, 8)  # the norm exceeds the reference, no singular value does
    assert restrain(below, Logarithm(1.2), 4.0).delta is below
    zero = torch.zeros(4, 5)
    assert restrain(zero, Logarithm(1.2), 1.0).delta is zero


def test_value_at_the_reference_is_unchanged():
    law = Logarithm(1.3)
    sigma = torch.tensor([4.0, 3.0], dtype=torch.float64)
    assert torch.equal(law(sigma, 4.0), sigma)


def test_guard_stops_expansion_and_can_be_switched_off():
    sigma = torch.tensor([2.5], dtype=torch.float64)  # reference below 1 / ln 1.2 = 5.48: the law amplifies
    assert float(Logarithm(1.2, guard=False)(sigma, 2.0)) > 2.5
    assert float(Logarithm(1.2)(sigma, 2.0)) == 2.5


def test_larger_base_restrains_more():
    delta = matrix([50.0], 5, 7)
    tops = [sigma_max(restrain(delta, Logarithm(base), 8.0).delta) for base in (1.2, 1.5, 3.0)]
    assert tops == sorted(tops, reverse=True)
    assert tops[-1] > 8.0


@pytest.mark.parametrize("base", [1.0, 0.5, float("nan"), float("inf"), -2.0])
def test_bad_base_is_refused(base):
    with pytest.raises(UserError, match="base"):
        Logarithm(base)


def test_non_finite_change_is_refused():
    with pytest.raises(UserError, match="NaN or infinity"):
        restrain(torch.tensor([[float("nan")]]), Logarithm(1.2), 1.0)


def test_condition_number_and_sigma_max_against_construction():
    assert sigma_max(matrix([7.0, 2.0, 0.5], 3, 9)) == pytest.approx(7.0, rel=1e-12)
    assert condition_number(matrix([7.0, 2.0, 0.5], 3, 9)) == pytest.approx(14.0, rel=1e-12)
    assert math.isnan(condition_number(torch.full((2, 3), float("nan"))))
