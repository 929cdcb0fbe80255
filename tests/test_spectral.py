"""The spectral engine against dense fp64 decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lightning.errors import UserError
from prune_lightning.spectral import (
    AccumulatedChange,
    FactoredMatrix,
    HardClip,
    Identity,
    Linear,
    Logarithm,
    NonFiniteChange,
    ScaleFreeLogarithm,
    condition_number,
    effective_rank,
    perturbation_bound,
    restrain_,
    restrained,
    sigma_max,
    singular_values,
    spectral_correction,
    stable_rank,
    triplets_above,
)
from prune_lightning.types import LowRankUpdate

LAWS = [Logarithm(1.2), Logarithm(math.e, guard=False), ScaleFreeLogarithm(10.0), Linear(), HardClip(), Identity()]


def matrix(sigma: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64))
    return left @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right.T


def dense_law(delta: torch.Tensor, law, reference: float) -> torch.Tensor:
    """Full SVD, every value above the reference mapped by itself."""
    left, sigma, right = torch.linalg.svd(delta.double(), full_matrices=False)
    above = sigma > reference
    sigma[above] = torch.cat([law(value[None], reference) for value in sigma[above]] or [sigma[:0]])
    return left @ torch.diag(sigma) @ right


def dense_prune(delta: torch.Tensor, base: float, reference: float, guard: bool = True) -> torch.Tensor:
    """PRUNE as the paper writes it: full SVD, every value mapped one by one."""
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    mapped = []
    for value in sigma.tolist():
        law = value if value <= reference else math.log(value, base) - math.log(reference, base) + reference
        mapped.append(min(law, value) if guard else law)
    return left @ torch.diag(torch.tensor(mapped, dtype=delta.dtype)) @ right


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


# -- laws ---------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(
        [Logarithm(1.2), Logarithm(3.0), ScaleFreeLogarithm(1.5), ScaleFreeLogarithm(8.0), Linear(0.3), HardClip()]
    ),
    st.floats(1e-3, 1e3),
    st.lists(st.floats(1.0, 1e9), min_size=2, max_size=8),
)
def test_laws_are_monotone_continuous_and_never_expand(law, reference, factors):
    sigma = torch.tensor(sorted(factors), dtype=torch.float64) * reference
    mapped = law(sigma, reference)
    assert (mapped <= sigma * (1 + 1e-12)).all()
    assert (mapped >= reference * (1 - 1e-12)).all()
    assert (mapped.diff() >= -1e-9 * mapped[:-1]).all()
    at = law(torch.tensor([reference], dtype=torch.float64), reference)
    assert math.isclose(float(at), reference, rel_tol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e3), st.floats(1.01, 100.0))
def test_scale_free_law_means_the_same_at_every_scale(scale, base):
    law, sigma = ScaleFreeLogarithm(base), torch.tensor([2.0, 7.0, 300.0], dtype=torch.float64)
    assert torch.allclose(law(sigma * scale, scale), law(sigma, 1.0) * scale, rtol=1e-10)


def test_published_law_amplifies_where_the_reference_is_small_unless_guarded():
    sigma = torch.tensor([2.5], dtype=torch.float64)  # reference below 1 / ln 1.2 = 5.48
    assert float(Logarithm(1.2, guard=False)(sigma, 2.0)) > 2.5
    assert float(Logarithm(1.2)(sigma, 2.0)) == 2.5


@pytest.mark.parametrize("base", [1.0, 0.5, float("nan"), float("inf"), -2.0])
@pytest.mark.parametrize("law", [Logarithm, ScaleFreeLogarithm])
def test_bad_arguments_of_laws_are_refused(law, base):
    with pytest.raises(UserError, match="base"):
        law(base)
    with pytest.raises(UserError, match="slope"):
        Linear(1.5)


def test_a_user_can_bring_a_law():
    delta = matrix([9.0, 2.0], 6, 8)
    assert sigma_max(restrained(delta, lambda sigma, reference: 0.5 * (sigma + reference), 4.0)) == pytest.approx(6.5)


# -- the dense path -----------------------------------------------------------------------------------------------
SPECTRA = {
    "few": [9.0, 5.0, 2.0, 0.1],
    "ties above": [300.0, 8.0, 8.0, 8.0, 3.9],
    "tie at the threshold": [30.0, 4.0, 4.0, 1.0],
    "twelve decades": [10.0**k for k in range(4, -9, -1)],
    "explosion": [1e9, 5.0, 1.0],
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (300, 410), (410, 300)])
def test_dense_path_equals_full_svd(shape, sigma, law):
    delta = matrix(sigma, *shape)
    ours, theirs = restrained(delta, law, 4.0), dense_law(delta, law, 4.0)
    # in an explosion nothing can be known better than to the rounding of the largest value
    limit = 1e-10 * float(theirs.norm()) if sigma[0] < 1e9 else 1e-14 * sigma[0]
    assert float((ours - theirs).norm()) < limit


@pytest.mark.parametrize("shape", [(30, 40), (700, 300)])
def test_dense_path_in_single_precision(shape):
    delta = matrix([50.0, 9.0, 4.5, 3.0, *[0.5] * 20], *shape).float()
    assert error(restrained(delta, Logarithm(2.0), 4.0), dense_law(delta, Logarithm(2.0), 4.0)) < 1e-5


def noise(rows: int, columns: int, scale: float) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * scale


def test_each_path_runs_where_it_suffices():
    few = matrix([9.0, 7.0, 6.0], 900, 400)
    assert triplets_above(few * 0.1, 4.0).path == "certificate"
    found = triplets_above(few + noise(900, 400, 0.02), 4.0)
    assert (found.path, len(found.sigma)) == ("lanczos", 3)
    assert triplets_above(noise(900, 400, 1.0), 10.0).path == "gram"  # all 400 values are above
    assert triplets_above(noise(30, 20, 1.0), 3.0).path == "gram"
    assert triplets_above(matrix([1e9, 5.0], 30, 20), 4.0).path == "svd"


def test_lanczos_finds_a_value_that_occurs_more_often_than_its_block_is_wide():
    many = matrix([5.0] * 30 + [1.0] * 40, 900, 400)
    found = triplets_above(many, 4.0)
    assert len(found.sigma) == 30
    assert torch.allclose(found.sigma, torch.full((30,), 5.0, dtype=torch.float64), rtol=1e-12)
    assert error(restrained(many, HardClip(), 4.0), dense_law(many, HardClip(), 4.0)) < 1e-10


@settings(deadline=None, max_examples=25)
@given(
    st.integers(257, 420),
    st.integers(257, 420),
    st.lists(st.floats(-3, 3), min_size=1, max_size=40),
    st.floats(0, 0.05),
    st.integers(0, 10**6),
)
def test_any_spectrum_is_found_whole(rows, columns, exponents, bulk, seed):
    """Lanczos is a search: what it returns is held against the complete decomposition."""
    delta = matrix([10**e for e in exponents], rows, columns, seed) + bulk * noise(rows, columns, 1.0)
    found, sigma = triplets_above(delta, 1.0), torch.linalg.svdvals(delta)
    clear = (sigma - 1.0).abs() > 1e-9  # a value at the threshold may fall to either side
    assert int((sigma[clear] > 1.0).sum()) <= len(found.sigma) <= int((sigma > 1.0 - 1e-9).sum())
    rebuilt = found.left @ torch.diag(found.sigma) @ found.right.T
    assert float(torch.linalg.matrix_norm(delta - rebuilt, 2)) <= 1.0 + 1e-8


def test_nothing_to_do_returns_the_same_object():
    delta = matrix([3.0, 1.0], 6, 8)
    assert restrained(delta, Logarithm(1.2), 4.0) is delta
    below = matrix([3.0, 3.0, 3.0], 6, 8)  # the norm exceeds the reference, no singular value does
    assert restrained(below, Logarithm(1.2), 4.0) is below
    zero = torch.zeros(4, 5)
    assert restrained(zero, Logarithm(1.2), 1.0) is zero


def test_untouched_directions_keep_their_bits():
    delta = torch.zeros(400, 300)
    delta[:10, :10] = torch.diag(torch.linspace(20, 5, 10))
    delta[10:, 10:] = noise(390, 290, 0.02).float()
    ours = restrained(delta, HardClip(), 4.0)
    assert torch.equal(ours[10:, 10:], delta[10:, 10:])
    assert torch.allclose(ours[:10, :10], 4 * torch.eye(10), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_reaches_a_factorisation(value):
    with pytest.raises(NonFiniteChange, match="NaN or infinity"):
        spectral_correction(torch.full((3, 4), value), Logarithm(1.2), 1.0)
    with pytest.raises(UserError, match="positive"):
        spectral_correction(torch.ones(3, 4), Logarithm(1.2), 0.0)


def test_restrain_in_place_for_any_loop():
    original = matrix([4.0, 1.0], 12, 20)
    weight = torch.nn.Parameter(original + matrix([30.0, 2.0], 12, 20, seed=1))
    expected = original + dense_law(weight.detach() - original, Logarithm(1.5), 4.0)
    found = restrain_(weight, original, Logarithm(1.5))
    assert (found.num_above, found.path) == (1, "gram")
    assert error(weight.detach(), expected) < 1e-10
    half = torch.nn.Parameter((original + matrix([30.0], 12, 20, seed=1)).bfloat16())
    restrain_(half, original.bfloat16(), HardClip(), reference=4.0)
    assert half.dtype == torch.bfloat16
    assert sigma_max(half.detach().double() - original.bfloat16().double()) == pytest.approx(4.0, rel=1e-2)


# -- the factored path --------------------------------------------------------------------------------------------
def updates(kind: str, count: int, rows: int, columns: int, dtype: torch.dtype) -> list[LowRankUpdate]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key, result = normal(columns, 1), []
    for step in range(count):
        left, right = normal(rows, 1), normal(columns, 1) * 0.2
        if kind == "collinear keys":
            right = key + 1e-7 * normal(columns, 1)
        elif kind == "repeated keys":
            right = key
        elif kind == "twelve decades":
            left = left * 10.0 ** (4 - 12 * step / count)
        elif kind == "batches":
            left, right = normal(rows, 4), normal(columns, 4) * 0.2
        elif kind == "zero steps":
            left = left * (step % 2)
        result.append(LowRankUpdate(left.to(dtype), right.to(dtype)))
    return result


KINDS = ["random", "collinear keys", "repeated keys", "twelve decades", "batches", "zero steps"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 12, 60])  # 60 goes beyond the rank up to which factors are kept
def test_accumulated_change_restrained_equals_full_svd(kind, count, dtype):
    rows, columns = 64, 40
    original = matrix([5.0, 1.0], rows, columns).to(dtype)
    change, exact = AccumulatedChange(original), torch.zeros(rows, columns, dtype=torch.float64)
    for update in updates(kind, count, rows, columns, dtype):
        change.add(update)
        exact += update.left.double() @ update.right.double().T
        found = spectral_correction(change, Logarithm(1.4), 5.0)  # as after every edit
    assert (change.factored() is None) == (change_rank(kind, count) > 30)
    weight = torch.empty_like(original)
    change.write(weight, original, found.correction)
    theirs = dense_law(exact, Logarithm(1.4), 5.0)
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    if change.factored() is None:  # the sum itself was rounded to the master's precision by then
        limit += 4 * torch.finfo(dtype).eps * float(exact.norm() / theirs.norm())
    assert float((weight.double() - original.double() - theirs).norm()) < limit * float(theirs.norm() + original.norm())


def change_rank(kind: str, count: int) -> int:
    return {"batches": 4 * count, "zero steps": count // 2}.get(kind, count)


@pytest.mark.parametrize("kind", KINDS)
def test_factored_matrix_stays_orthonormal_and_exact(kind):
    factored, exact = FactoredMatrix(90, 70, torch.device("cpu")), torch.zeros(90, 70, dtype=torch.float64)
    for update in updates(kind, 60, 90, 70, torch.float64)[: 16 if kind == "batches" else 60]:
        factored.append(update)
        exact += update.dense()
    for basis in (factored.left, factored.right):
        vectors = basis.vectors
        assert torch.allclose(vectors.T @ vectors, torch.eye(len(basis), dtype=torch.float64), atol=1e-12)
    assert error(factored.dense(), exact) < 1e-12
    assert torch.allclose(
        factored.singular_values(),
        torch.linalg.svdvals(exact)[: len(factored.singular_values())],
        atol=1e-12 * float(exact.norm()),
    )
    if kind == "repeated keys":
        assert (len(factored.left), len(factored.right)) == (60, 1)


def test_bent_bases_are_straightened():
    factored = FactoredMatrix(50, 40, torch.device("cpu"))
    for update in updates("random", 8, 50, 40, torch.float64):
        factored.append(update)
    factored.left._store[:8] += 1e-6 * noise(8, 50, 1.0)
    bent = factored.dense()
    factored._reorthogonalise()
    vectors = factored.left.vectors
    assert torch.allclose(vectors.T @ vectors, torch.eye(8, dtype=torch.float64), atol=1e-14)
    assert error(factored.dense(), bent) < 1e-12


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.floats(-6, 6), st.booleans()), min_size=1, max_size=25),
    st.sampled_from(LAWS),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_stream_of_updates_carried_on_or_not(steps, law, carry, seed):
    """Random ranks, scales and repetitions; the restrained change is carried on, or the raw sum restrained."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, reference = 36, 48, 2.0
    change, exact = (
        AccumulatedChange(torch.zeros(rows, columns, dtype=torch.float64)),
        torch.zeros(rows, columns, dtype=torch.float64),
    )
    left = right = torch.ones(rows, 1, dtype=torch.float64)
    largest = 0.0
    for rank, exponent, repeat in steps:
        if not repeat or right.shape[0] == rows:
            right = torch.randn(columns, rank, generator=generator, dtype=torch.float64)
        left = torch.randn(rows, right.shape[1], generator=generator, dtype=torch.float64) * 10**exponent
        change.add(LowRankUpdate(left, right))
        exact = exact + left @ right.T
        largest = max(largest, float(exact.norm()))
        found, theirs = spectral_correction(change, law, reference), dense_law(exact, law, reference)
        if carry:
            exact = theirs
            if found.correction is not None:
                change.subtract(found.correction)
    ours = torch.empty(rows, columns, dtype=torch.float64)
    change.write(ours, correction=None if carry else found.correction)
    assert float((ours - theirs).norm()) < 1e-10 * float(theirs.norm()) + 1e-13 * largest


def test_correction_keeps_the_bits_it_does_not_touch():
    like = torch.zeros(60, 50)
    change = AccumulatedChange(like)
    big, small = torch.zeros(60, 1), torch.zeros(60, 1)
    big[:5], small[5:] = 9.0, torch.randn(55, 1, generator=torch.Generator().manual_seed(0))
    key = torch.zeros(50, 2)
    key[:5, 0], key[5:, 1] = 1.0, torch.randn(45, generator=torch.Generator().manual_seed(1)) * 0.01
    change.add(LowRankUpdate(torch.cat([big, small], 1), key))
    plain, corrected = torch.empty_like(like), torch.empty_like(like)
    change.write(plain)
    change.write(corrected, correction=spectral_correction(change, HardClip(), 4.0).correction)
    assert torch.equal(plain[5:, 5:], corrected[5:, 5:])
    assert not torch.equal(plain[:5, :5], corrected[:5, :5])


# -- diagnostics --------------------------------------------------------------------------------------------------
def test_figures_of_a_spectrum_against_construction():
    assert sigma_max(matrix([7.0, 2.0, 0.5], 3, 9)) == pytest.approx(7.0, rel=1e-12)
    assert condition_number(matrix([7.0, 2.0, 0.5], 3, 9)) == pytest.approx(14.0, rel=1e-12)
    assert math.isnan(condition_number(torch.full((2, 3), float("nan"))))
    assert math.isnan(sigma_max(torch.full((300, 300), float("nan"))))
    sigma = singular_values(matrix([4.0, 4.0, 4.0, 1e-9], 9, 8))
    assert stable_rank(sigma) == pytest.approx(3.0)
    assert effective_rank(sigma) == pytest.approx(3.0, rel=1e-6)
    assert (stable_rank(torch.zeros(3)), effective_rank(torch.zeros(3))) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_sigma_max_of_large_matrices_to_1e_6(shape):
    full_rank = noise(*shape, 1.0)
    assert sigma_max(full_rank) == pytest.approx(float(torch.linalg.svdvals(full_rank)[0]), rel=1e-6)
    assert sigma_max(full_rank.float()) == pytest.approx(float(torch.linalg.svdvals(full_rank)[0]), rel=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_perturbation_bound_holds_and_can_be_reached(law):
    original, delta = matrix([5.0, 1.0], 30, 40), matrix([60.0, 7.0, 1.0], 30, 40, seed=9)
    weight = original + restrained(delta, law, 5.0)
    bound = perturbation_bound(law, sigma_max(delta), 5.0)
    assert sigma_max(weight) <= bound * (1 + 1e-12)
    aligned = original / 5.0 * 60.0
    assert sigma_max(original + restrained(aligned, law, 5.0)) == pytest.approx(
        perturbation_bound(law, 60.0, 5.0), rel=1e-10
    )
