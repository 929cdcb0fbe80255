"""Identities between the closed forms (fp64, 1e-10), each against a dense computation written out here."""

from __future__ import annotations

import pytest
import torch

from prune_lightning.methods.least_squares import RecursiveInverse, regression_update
from prune_lightning.models.second_moment import SecondMoment

N, M, B = 40, 24, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def moment() -> SecondMoment:
    keys = normal(N, 300, seed=1) * torch.linspace(0.05, 2, N, dtype=torch.float64)[:, None]
    return SecondMoment(keys @ keys.T / 300)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).norm()) < 1e-10 * float(theirs.norm())


@pytest.mark.parametrize("ridge", [0.01, 1.0, 15000.0])
def test_memit_equals_the_dense_solve(moment, ridge):
    keys, residual = normal(N, B, seed=2), normal(M, B, seed=3)
    ours = regression_update(residual, keys, moment.solve(keys), ridge).dense()
    dense = residual @ keys.T @ torch.linalg.inv(ridge * moment.matrix + keys @ keys.T)
    assert close(ours, dense)


def test_emmet_equals_memit_with_the_product_of_its_weights(moment):
    keys, residual, damping, weight = normal(N, B, seed=2), normal(M, B, seed=3), 0.1, 50.0
    emmet = regression_update(residual, keys, moment.solve(keys) / weight, damping).dense()
    assert close(emmet, regression_update(residual, keys, moment.solve(keys), damping * weight).dense())


def test_emmet_without_damping_meets_the_constraint_whatever_the_weight(moment):
    keys, residual = normal(N, B, seed=2), normal(M, B, seed=3)
    for weight in (1.0, 1e4):
        update = regression_update(residual, keys, moment.solve(keys) / weight, 0.0).dense()
        assert close(update @ keys, residual)
    single = regression_update(residual[:, :1], keys[:, :1], moment.solve(keys[:, :1]), 0.0).dense()
    whitened = torch.linalg.inv(moment.matrix) @ keys[:, :1]
    assert close(single, residual[:, :1] @ whitened.T / (keys[:, :1].T @ whitened))


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_keys_that_coincide_share_the_residual(moment, rounding):
    """As the keys of one subject do, up to the rounding of an fp32 model."""
    for seed in range(0, 40, 4):
        key, other, noise = normal(N, 1, seed=seed), normal(N, 1, seed=seed + 1), normal(N, 1, seed=seed + 2)
        keys, residual = torch.cat([key, other, key * (1 + rounding * noise)], 1), normal(M, 3, seed=seed + 3)
        update = regression_update(residual, keys, moment.solve(keys), 0.0).dense()
        once, mean = keys[:, :2], torch.stack([residual[:, [0, 2]].mean(1), residual[:, 1]], 1)
        whitened = torch.linalg.inv(moment.matrix) @ once
        expected = mean @ torch.linalg.inv(once.T @ whitened) @ whitened.T
        assert float((update - expected).norm() / expected.norm()) <= 100 * rounding + 1e-10


def test_alphaedit_lu_equals_reduced_equals_recursive_over_three_batches(moment):
    values, vectors = moment.eigen()
    null, ridge = vectors[:, values < 0.5], 10.0
    projector = null @ null.T
    assert 0 < null.shape[1] < N
    recursive, past = RecursiveInverse(projector / ridge), torch.zeros(N, N, dtype=torch.float64)
    for batch in range(3):
        keys, residual, after = (
            normal(*shape, seed=10 * batch + i) for i, shape in enumerate(((N, B), (M, B), (N, B)))
        )
        ours = regression_update(residual, keys, recursive.solve(keys), 1.0).dense()
        bracket = keys @ keys.T + past
        lu = torch.linalg.solve(projector @ bracket + ridge * torch.eye(N).double(), projector @ keys @ residual.T).T
        reduced = null.T @ bracket @ null + ridge * torch.eye(null.shape[1]).double()
        spd = (null @ torch.linalg.solve(reduced, null.T @ keys @ residual.T)).T
        assert close(lu, spd)
        assert close(ours, spd)
        past += after @ after.T
        recursive.add(after)
        assert torch.allclose(recursive.inverse, recursive.inverse.T, atol=1e-15)


def test_memit_with_past_keys_equals_the_dense_solve(moment):
    ridge, past = 20.0, torch.zeros(N, N, dtype=torch.float64)
    recursive = RecursiveInverse(moment.inverse() / ridge)
    for batch in range(3):
        keys, residual = normal(N, B, seed=30 + batch), normal(M, B, seed=40 + batch)
        ours = regression_update(residual, keys, recursive.solve(keys), 1.0).dense()
        dense = residual @ keys.T @ torch.linalg.inv(ridge * moment.matrix + past + keys @ keys.T)
        assert close(ours, dense)
        recursive.add(keys)
        past += keys @ keys.T


def test_a_thousand_batches_keep_the_inverse_exact(moment):
    recursive, total = RecursiveInverse(moment.inverse()), moment.matrix.clone()
    for batch in range(1000):
        keys = normal(N, 2, seed=batch)
        recursive.add(keys)
        total += keys @ keys.T
    assert close(recursive.inverse, torch.linalg.inv(total))


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_keys_that_are_not_finite_give_an_update_that_is_not(moment, damping):
    """An eigenvalue solver would fail on such a system of this size."""
    keys, residual = normal(N, B, seed=2), normal(M, B, seed=3)
    keys[:, 1] = torch.nan
    assert not regression_update(residual, keys, moment.solve(keys), damping).is_finite()
